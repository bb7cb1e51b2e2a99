"""launch/sweep.sh from ready-made tables to the report, killed on the way; with --slow also launch/demo.sh."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest
from common import BASE, ROOT, phantoms

import train_full

LABELS = ["Edema", "No Finding", "Pleural Effusion"]
TIMES = ("seconds", "seconds_per_epoch", "peak_memory_gib")  # what two runs of the same study may differ in
STEPS = {"runs": "training_summary.json", "samples": "metadata.csv"}
STEPS |= {"evaluations": "generation_metrics.json", "downstream": "downstream_metrics.json"}
CLASSIFIER = "--arch resnet18 --weights none --resolution 32 --num_train_epochs 3 --num_seeds 1 --train_batch_size 4"


def start(study, tables, *flags, **variables):
    small = {
        "STUDY": study,
        "METHODS": "bitfit",
        "MODEL": BASE,
        "LABELS": ",".join(LABELS),
        "LAUNCH": "python",
        "RESOLUTION": 64,
        "BATCH": 2,
        "GLOBAL_BATCH": 2,
        "BITFIT_LR": "1e-3",
        "MIXED_PRECISION": "no",
        "SAMPLE_FLAGS": "--images_per_label 6 --num_inference_steps 3",
        "EVALUATION_FLAGS": f"--features {study}/downstream/real/classifier --num_subsamples 3",
        "DOWNSTREAM_FLAGS": f"{CLASSIFIER} --bootstrap_samples 50",
    }
    environment = {name: str(value) for name, value in (small | tables | variables).items()}
    steps = ["--max_train_steps=6", "--checkpointing_steps=2", "--num_validation_images=0"]
    return subprocess.Popen(
        ["bash", ROOT / "launch" / "sweep.sh", *steps, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, status=0):
    """Return the steps that a sweep ran and its errors."""
    said, errors = process.communicate(timeout=900)
    assert process.returncode == status, errors[-3000:]
    return re.findall(r"^== (.*)", said, re.MULTILINE), errors


def values(study):
    """Return the lines of report.csv but times and memory."""
    lines = pd.read_csv(study / "report" / "report.csv", dtype=str, keep_default_na=False)
    return lines[~lines["metric"].isin(TIMES)].reset_index(drop=True)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Make a split of the phantoms' patients, not beside the images, with uncertain and lateral rows in each part."""
    folder, source = tmp_path_factory.mktemp("tables"), phantoms(90)
    frame = pd.read_csv(source, dtype=str, keep_default_na=False)
    patients = train_full.load_image_table(str(source))["patient"]
    part = patients.map(
        {name: ("TRAIN", "TRAIN", "VALIDATION", "TEST", "TEST")[i % 5] for i, name in enumerate(patients.unique())}
    )
    paths = {f"{name}_CSV": folder / f"{name}.csv" for name in part.unique()}
    for name, path in paths.items():
        frame[part == name.removesuffix("_CSV")].to_csv(path, index=False)
    return paths | {"IMAGE_ROOT": source.parent.parent}


def kill_at(progress, study, tables):
    """Start the sweep, and kill it when a file or folder appears."""
    process, began = start(study, tables), time.monotonic()
    while not (study / progress).exists() and process.poll() is None and time.monotonic() - began < 600:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def study(tables, tmp_path_factory):
    """A study that was killed in its training; what was finished before is not done again."""
    folder = tmp_path_factory.mktemp("study")
    kill_at("runs/bitfit/checkpoint-2", folder, tables)
    assert finish(start(folder, tables))[0] == [f"{part}/bitfit/{name}" for part, name in STEPS.items()]
    return folder


def test_a_ready_made_split_is_counted_exactly(study, tables):
    """The paper's Table 2: the frontal images with a finding in each table, as they are in the files."""
    counts, uncertain = {}, 0
    for part, name in (("train", "TRAIN"), ("val", "VALIDATION"), ("test", "TEST")):
        frame = pd.read_csv(tables[f"{name}_CSV"])
        frame = frame[frame["Frontal/Lateral"] == "Frontal"]
        uncertain += int((frame[LABELS] == -1).sum().sum())
        counts |= {(f"images_{part}", label): int((frame[label] == 1).sum()) for label in LABELS}
    lines = values(study)
    found = {(metric, label): value for metric, label, value in zip(lines["metric"], lines["label"], lines["value"])}
    assert {key: float(found[key]) for key in counts} == counts and min(counts.values()) > 0 and uncertain


def test_every_row_of_the_report_has_values(study):
    lines = values(study)
    lines = lines[lines["value"] != ""]
    rows = set(zip(lines["table"], lines["row"]))
    assert {("1", "bitfit"), ("2", "bitfit"), ("3", "bitfit"), ("3", "base")} <= rows
    assert {("4", "bitfit"), ("4", "base"), ("4", "real"), ("pairs", "bitfit - base")} <= rows
    assert "<table>" in (study / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_study_killed_on_the_way_ends_with_the_same_report(study, tables):
    """A row is run anew and killed in its sampling; what the base model needed is not."""
    before, figure = values(study), (study / "report" / "figure2.png").read_bytes()
    for folder in ("runs", "samples/bitfit", "evaluations/bitfit", "downstream/bitfit", "report"):
        shutil.rmtree(study / folder)
    kill_at("samples/bitfit/edema/000000.png", study, tables)
    steps, _ = finish(start(study, tables))
    assert steps == [f"{part}/bitfit/{name}" for part, name in STEPS.items() if part != "runs"]
    pd.testing.assert_frame_equal(values(study), before)
    assert len(before) > 100 and (study / "report" / "figure2.png").read_bytes() == figure


@pytest.mark.parametrize(
    ("variables", "prompts"),
    [
        ({"SAMPLING": "labels"}, "--labels Edema"),
        ({"SAMPLING": "like_test"}, "--like_csv TEST.csv --uncertain ignore --"),
        (
            {"SAMPLING": "like_test", "TEST_CSV": ""},
            "--like_csv TRAIN.csv --split test --split_seed 0 --uncertain ignore",
        ),
    ],
)
def test_seeds_and_prompts_are_passed_on(tmp_path, tables, variables, prompts):
    given = {"LAUNCH": "echo", "REPORT": "no", "METHODS": "lora unet", "SEEDS": "3 0", "VALIDATION_CSV": ""}
    given |= {"VALIDATION_CSV": tables["VALIDATION_CSV"]} if variables.get("TEST_CSV") != "" else {}
    process = start(tmp_path, tables, **given | variables)
    lines = process.communicate(timeout=60)[0].replace(f"{tables['TEST_CSV'].parent}/", "").splitlines()
    assert process.returncode == 0
    trained = [re.search(r"/runs/(\S+) .*--seed (\d)", line).groups() for line in lines if line.startswith("train_")]
    assert trained == [("lora_seed3", "3"), ("unet_seed3", "3"), ("lora", "0"), ("unet", "0")]
    sampled = [line for line in lines if line.startswith("sample.py")]
    assert len(sampled) == 5 and all(prompts in line for line in sampled)
    assert [line.split("/")[-1] for line in sampled] == ["base", "lora_seed3", "unet_seed3", "lora", "unet"]


@pytest.mark.slow
def test_a_seed_added_to_a_finished_study_is_trained_and_judged_and_the_report_has_means(study, tables):
    before = values(study).set_index(["table", "row", "metric", "label"])["value"]
    steps, _ = finish(start(study, tables, SEEDS="0 7"))
    assert steps == [f"{part}/bitfit_seed7/{name}" for part, name in STEPS.items()]
    summaries = [json.loads((study / "runs" / row / STEPS["runs"]).read_text()) for row in ("bitfit", "bitfit_seed7")]
    assert [summary["arguments"]["seed"] for summary in summaries] == [0, 7]
    # The noise of the samples is the same.
    assert len({pd.read_csv(path)["seed"].unique().item() for path in study.glob("samples/*/metadata.csv")}) == 1
    rows = json.loads((study / "evaluations/bitfit_seed7/generation_metrics.json").read_text())["results"]
    (second,) = [row["value"] for row in rows if (row["metric"], row["label"]) == ("fid", "all")]
    lines = values(study).set_index(["table", "row", "metric", "label"])["value"]
    mean, first = (float(found["3", "bitfit", "fid", "all"]) for found in (lines, before))
    assert first != second and mean == pytest.approx((first + second) / 2)
    assert lines["3", "base", "fid", "all"] == before["3", "base", "fid", "all"]


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({"TRAIN_CSV": "nowhere.csv"}, [], "no table 'nowhere.csv'; set TRAIN_CSV"),
        ({"METHODS": "lora unet_vea"}, [], "METHODS: 'unet_vea'"),
        ({"BUDGET": "author"}, [], "BUDGET=author is none of: equal authors"),
        ({"BATCH": 4, "GLOBAL_BATCH": 6}, [], "GLOBAL_BATCH=6"),
        ({"TEST_CSV": ""}, [], "VALIDATION_CSV is set and TEST_CSV is not"),
        ({}, ["--split_seed", "1"], "--split_seed"),
        ({}, ["--resize_mode=pad"], "--resize_mode"),
        ({}, ["--max_train_step", "9"], "no training script has a flag --max_train_step"),
        ({"LABELS": "Edema,Oedema"}, [], "has no column 'Oedema'; set LABELS"),
        ({"METHOD": "lora"}, [], "METHOD is set, but the variable is called METHODS"),
        ({"SEEDS": "0,1"}, [], "SEEDS='0,1' is no list of numbers"),
        ({"SEEDS": "0 1"}, ["--seed", "2"], "--seed cannot be passed"),
    ],
)
def test_mistakes_are_refused_before_the_first_step(tables, tmp_path, variables, flags, said):
    steps, errors = finish(start(tmp_path / "study", tables, *flags, **variables), status=2)
    assert not steps and said in errors and errors.count("\n") == 1 and not (tmp_path / "study").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_gains_over_the_base_model(tmp_path):
    """Up to a quarter of an hour on two free cores."""

    def demo(status=0, **variables):
        environment = os.environ | {"STUDY": str(tmp_path / "demo")} | variables
        command = ["bash", ROOT / "launch" / "demo.sh"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout.splitlines()

    lines = demo()
    gains = [line for line in lines if line.startswith(("lora: ", "dora: ", "unet: "))]
    assert len(gains) == 9 and all(line.endswith(": better") for line in gains), gains
    assert lines[-1] == f"report: {tmp_path}/demo/report/report.html"
    rows = values(tmp_path / "demo")
    assert set(rows["row"][(rows["table"] == "4") & (rows["value"] != "")]) == {"unet", "lora", "dora", "base", "real"}
    # Started again it trains nothing anew, whatever the shell holds for another study.
    again = demo(TEST_CSV="mine.csv", LABELS="Edema")
    assert [line for line in again if line.startswith("== ")] == ["== phantoms", "== gains over the base model"]
    demo(status=2, METHODS="lora bitfid")
