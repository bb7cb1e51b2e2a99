"""launch/demo.sh and launch/train_all.sh as users run them, with few steps."""

import json
import os
import subprocess

import numpy as np
import pytest
from common import BASE, PEFT_ROWS, REAL_CSV, ROOT, phantoms, result, train
from PIL import Image


def bash(script, *flags, **environment) -> subprocess.CompletedProcess:
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *map(str, flags)], capture_output=True, text=True, timeout=900,
        env=os.environ | {"VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", ""), **{k: str(v) for k, v in environment.items()}},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_demo_ends_with_a_picture_and_goes_on_where_it_was(tmp_path):
    short = {"STEPS": 3, "IMAGES": 2, "METHODS": "bitfit", "DEMO_DIR": tmp_path / "demo"}
    done = bash("demo.sh", "--num_validation_images=0", **short)
    assert done.stdout.splitlines()[-1] == f"side by side: {tmp_path / 'demo' / 'comparison.png'}"
    picture = np.asarray(Image.open(tmp_path / "demo" / "comparison.png").convert("RGB"))
    assert picture.shape[1] > 800 and picture.std() > 20
    summary = json.loads((tmp_path / "demo" / "runs" / "bitfit" / "training_summary.json").read_text())
    assert summary["steps"] == 3 and summary["images"] > 400
    before = (tmp_path / "demo" / "runs" / "bitfit" / "training_summary.json").stat().st_mtime_ns
    again = bash("demo.sh", **short)
    assert (tmp_path / "demo" / "runs" / "bitfit" / "training_summary.json").stat().st_mtime_ns == before
    assert "== train" not in again.stdout and "12 already there" in again.stdout


def test_all_rows_in_a_loop_end_with_a_table(tmp_path):
    flags = ["--data_csv", phantoms(), "--pretrained_model_name_or_path", BASE, "--resolution", 64, "--max_train_steps", 2]
    flags += ["--train_batch_size", 2, "--gradient_accumulation_steps", 1, "--max_validation_samples", 4, "--num_validation_images", 0]
    done = bash("train_all.sh", *flags, ROWS="vae_text_encoder bitfit", RUNS=tmp_path / "runs", LAUNCH="python")
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in table] == ["row", "---", "vae_text_encoder", "bitfit"]
    assert all("not" not in row[1] for row in table[2:])


@pytest.mark.skipif(not REAL_CSV.is_file(), reason="the real radiographs are not on this machine")
@pytest.mark.parametrize("row", ["unet", "unet_text_encoder", "lora", "dora", "bitfit", "difffit"])
def test_training_on_real_radiographs_lowers_the_heldout_loss(row, tmp_path):
    rate = ["--learning_rate=1e-3"] if row in PEFT_ROWS else ["--unet_lr=1e-4", "--text_encoder_lr=1e-5"]
    summary = train(row, tmp_path / "run", *rate, "--train_batch_size=8", "--max_validation_samples=64", csv=REAL_CSV, steps=40)
    change = next(r for r in summary["results"] if r["metric"] == "heldout_diffusion_change")
    assert change["n"] == 64 and change["high"] < 0
    assert result(summary, "heldout_diffusion") < result(summary, "heldout_diffusion_start")
