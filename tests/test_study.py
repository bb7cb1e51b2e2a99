"""launch/sweep.sh from ready-made tables to the report, killed on the way; and launch/demo.sh."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from common import BASE, ROOT, phantoms
from PIL import Image

import train_full

LABELS = ["Edema", "No Finding", "Pleural Effusion"]
KILLS = 5
# What a second run of the same study may differ in.
TIMES = ("seconds", "seconds_per_epoch", "peak_memory_gib")


def split_tables(folder: Path) -> dict[str, Path]:
    """A ready-made triple of the phantoms' patients, with uncertain and lateral rows in each part."""
    source = phantoms(90)
    frame = pd.read_csv(source, dtype=str, keep_default_na=False)
    patients = train_full.load_image_table(str(source))["patient"]
    part = patients.map({name: ("train", "train", "val", "test", "test")[i % 5] for i, name in enumerate(patients.unique())})
    paths = {name: folder / f"{name}.csv" for name in ("train", "val", "test")}
    for name, path in paths.items():
        frame[part == name].to_csv(path, index=False)
    return paths


def environment(study: Path, **more) -> dict[str, str]:
    small = {
        "STUDY": study, "METHODS": "bitfit", "MODEL": BASE, "LAUNCH": "python", "LABELS": ",".join(LABELS), "RESOLUTION": 64, "BATCH": 2, "GLOBAL_BATCH": 2,
        "BITFIT_LR": "1e-3", "MIXED_PRECISION": "no", "SAMPLE_FLAGS": "--images_per_label 6 --num_inference_steps 3",
        "EVALUATION_FLAGS": f"--features {study}/downstream/real/classifier --num_subsamples 3",
        "DOWNSTREAM_FLAGS": "--arch resnet18 --weights none --resolution 32 --num_train_epochs 3 --num_seeds 1 --train_batch_size 4 --bootstrap_samples 50",
    }  # fmt: skip
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in (small | more).items()}


def sweep(*flags) -> list[str]:
    return ["bash", str(ROOT / "launch" / "sweep.sh"), "--max_train_steps", "6", "--checkpointing_steps", "2", "--num_validation_images", "0", *flags]


def report_lines(study: Path) -> list[dict]:
    with open(study / "report" / "report.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_table_1(study: Path, name: str) -> str:
    """report.md or report.html without the table of times and memory, and without its own folder's name."""
    text = (study / "report" / name).read_text().replace(str(study), "STUDY")
    rest, tables = re.subn(r"(?ms)^(#+ |<h[23]>)Table 1.*?(?=^#+ |^<h[23]>)", "", text)
    assert tables == 1
    return rest


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, dict, float]:
    """An undisturbed study of a ready-made triple; its folder, its tables and its seconds."""
    folder = tmp_path_factory.mktemp("study")
    paths = split_tables(folder)
    # The tables do not lie beside the images.
    tables = {"TRAIN_CSV": paths["train"], "VALIDATION_CSV": paths["val"], "TEST_CSV": paths["test"], "IMAGE_ROOT": phantoms(90).parent.parent}
    began = time.monotonic()
    done = subprocess.run(sweep(), capture_output=True, text=True, timeout=900, env=environment(folder / "whole", **tables))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "whole", tables, time.monotonic() - began


def test_a_ready_made_split_is_counted_exactly(study):
    """The paper's Table 2: the frontal images with a finding in each table, as they are in the files."""
    whole, tables, _ = study
    counts, uncertain = {}, 0
    for part, path in zip(("train", "val", "test"), list(tables.values())[:3]):
        frame = pd.read_csv(path)
        frame = frame[frame["Frontal/Lateral"] == "Frontal"]
        uncertain += int((frame[LABELS] == -1).sum().sum())
        counts |= {(f"images_{part}", label): int((frame[label] == 1).sum()) for label in LABELS}
    found = {(row["metric"], row["label"]): float(row["value"]) for row in report_lines(whole) if row["metric"].startswith("images_")}
    assert {key: found[key] for key in counts} == counts and min(counts.values()) > 0 and uncertain


def test_nothing_is_missing_in_the_report(study, tmp_path):
    whole = study[0]
    text = (whole / "report" / "report.md").read_text()
    assert "not recorded" not in text and "not evaluated" not in text
    metrics = {(row["table"], row["row"]) for row in report_lines(whole) if row["value"]}
    assert {("1", "bitfit"), ("2", "bitfit"), ("3", "bitfit"), ("3", "base"), ("4", "bitfit"), ("4", "base"), ("4", "real")} <= metrics
    with Image.open(whole / "report" / "figure2.png") as figure:
        assert np.asarray(figure.convert("L")).std() > 20
    # As README.md makes it again.
    subprocess.run([sys.executable, ROOT / "launch" / "report.py", "--study", whole, "--output_dir", tmp_path], check=True)
    for path in (whole / "report").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_study_killed_on_the_way_ends_with_the_same_report(study, tmp_path):
    whole, tables, seconds = study
    generator, kills = random.Random(0), 0
    env = environment(tmp_path / "killed", **tables)
    while kills < KILLS:
        job = subprocess.Popen(sweep(), env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # Far enough for some steps to be done, and all five before the end on a machine that is faster now than it was.
            job.wait(generator.uniform(0.05, 0.18) * seconds)
            raise AssertionError("the study ended before all kills")
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            kills += 1
        job.wait()
    done = subprocess.run(sweep(), capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = tmp_path / "killed"
    figures, again = ([row for row in report_lines(folder) if row["metric"] not in TIMES] for folder in (whole, killed))
    assert again == figures and len(figures) > 100
    for name in ("report.md", "report.html"):
        assert without_table_1(killed, name) == without_table_1(whole, name)
    assert (killed / "report" / "figure2.png").read_bytes() == (whole / "report" / "figure2.png").read_bytes()


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({"TRAIN_CSV": "nowhere.csv"}, [], "no table 'nowhere.csv'; set TRAIN_CSV"),
        ({"METHODS": "lora unet_vea"}, [], "METHODS: 'unet_vea' is none of"),
        ({"BUDGET": "author"}, [], "BUDGET=author is neither equal nor authors"),
        ({"BATCH": 4, "GLOBAL_BATCH": 6}, [], "GLOBAL_BATCH=6 is no multiple of BATCH=4"),
        ({"VALIDATION_CSV": "val.csv"}, [], "VALIDATION_CSV is set and TEST_CSV is not"),
        ({}, ["--split", "all"], "--split is not for the trainings alone"),
        ({}, ["--split_seed", "1"], "--split_seed is not for the trainings alone"),
        ({}, ["--resize_mode=pad"], "--resize_mode is not for the trainings alone; set RESIZE_MODE"),
    ],
)
def test_what_can_be_known_before_the_first_hour_is_said_before_it(tmp_path, variables, flags, said):
    env = environment(tmp_path / "study", **({"TRAIN_CSV": phantoms(90)} | variables))
    done = subprocess.run(sweep(*flags), capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "study").exists()


def demo(study: Path, status: int = 0, **more) -> subprocess.CompletedProcess:
    env = os.environ | {"VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", ""), "STUDY": str(study), **more}
    done = subprocess.run(["bash", str(ROOT / "launch" / "demo.sh")], capture_output=True, text=True, timeout=2700, env=env)
    assert done.returncode == status, done.stderr[-3000:]
    return done


# Up to a quarter of an hour on two quiet cores, of which another test has one.
@pytest.mark.timeout(3600)
def test_the_demo_gains_over_the_base_model(tmp_path):
    """The whole demo; what it says of the gains, and that the figures bear it out."""
    done = demo(tmp_path / "demo")
    lines = done.stdout.splitlines()
    assert lines[-1] == f"report: {tmp_path / 'demo' / 'report' / 'report.html'}" and Path(lines[-1].split()[1]).is_file()
    gains = [line for line in lines if line.startswith(("lora: ", "dora: ", "unet: "))]
    assert len(gains) == 9 and all(": better beyond the intervals" in line for line in gains), gains
    rows = {
        name: {row["metric"]: row for row in json.loads((tmp_path / "demo" / "evaluations" / name / "generation_metrics.json").read_text())["results"] if row["label"] == "all"}
        for name in ("base", "lora", "dora", "unet")
    }
    for name in ("lora", "dora", "unet"):
        assert rows[name]["fid"]["value"] < rows["base"]["fid"]["value"] and rows[name]["fid_gain"]["low"] > 0
        for metric in ("class_consistency", "class_consistency_auroc"):
            assert rows[name][metric]["low"] > rows["base"][metric]["high"]
    # Nothing is missing: what ran has a value in every row of the report, and the base model and real images are there too.
    reported = report_lines(tmp_path / "demo")
    missing = [row for row in reported if not row["value"] and row["note"] != "not run" and not row["note"].startswith("only in the paper")]
    assert not missing, missing
    assert {row["row"] for row in reported if row["table"] == "4" and row["value"]} == {"unet", "lora", "dora", "base", "real"}
    # Started again it trains nothing anew, whatever the shell has set for another study.
    again = demo(tmp_path / "demo", TEST_CSV="mine.csv", LABELS="Edema")
    assert re.findall(r"^== .*", again.stdout, re.MULTILINE) == ["== phantoms", "== gains over the base model"]
    assert again.stdout.splitlines()[-1] == lines[-1]
    failed = demo(tmp_path / "demo", status=1, METHODS="lora bitfid")
    assert "METHODS: 'bitfid' is none of" in failed.stderr and failed.stderr.splitlines()[-1].startswith("launch/demo.sh: error: a row failed")
    assert "report: " not in failed.stdout
