"""Runs go from the newest versions to the lower bounds of requirements.txt and back.

`bash tests/run.sh --lowest` runs this in an environment of the lower bounds; NEWEST_PYTHON is that of the newest.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import numpy as np
import pytest
from common import BASE, PEFT_ROWS, draw, phantoms, pipeline_of

import sample

RATES = {row: ["--learning_rate=1e-2", "--rank=4", "--save_merged"] for row in PEFT_ROWS}
RATES["lora"] += ["--train_text_encoder"]
RATES["dora"] += ["--train_text_encoder"]
RATES["unet_vae_text_encoder"] = ["--unet_lr=1e-3", "--text_encoder_lr=1e-3", "--vae_lr=1e-3"]
OPTIONS = ["--checkpointing_steps=2", "--lr_scheduler=cosine"]


def sample_run(run, images):
    """Make the first `images` images of a run; those that exist are kept."""
    flags = ["--labels=Edema", "--num_inference_steps=2", "--resolution=64", f"--images_per_label={images}"]
    common.run_main(sample, ["--model", str(run), *flags, f"--output_dir={run}-samples"])


def saved_pipeline(row, run):
    return pipeline_of(run / "merged" if row in PEFT_ROWS else run)


def train(folder, csv):
    """Train each kind of row, and draw images with it."""
    for row, rates in RATES.items():
        common.train(row, folder / row, *OPTIONS, *rates, csv=csv, steps=4)
        np.save(folder / f"{row}.npy", draw(saved_pipeline(row, folder / row)))
        sample_run(folder / row, 1)


def use(folder, csv):
    """Load and resume these runs, and assert that images and held-out losses are those of the other versions."""
    for row, rates in RATES.items():
        run, pipelines = folder / row, {"from_pretrained": saved_pipeline(row, folder / row)}
        if row in ("lora", "dora"):
            pipelines["load_lora_weights"] = pipeline_of(BASE)
            pipelines["load_lora_weights"].load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
        for model in (run, run / "checkpoint-4"):
            args = sample.parse_args(["--model", str(model)])
            pipelines[f"sample.py --model {model.name}"], _ = sample.load_model(args, sample.read_summary(model))
        images = np.load(folder / f"{row}.npy")
        found = {name: abs(draw(pipeline) - images).max() for name, pipeline in pipelines.items()}
        resume = f"--resume_from_checkpoint={run / 'checkpoint-2'}"
        resumed = common.train(row, folder / "resumed" / row, *OPTIONS, *rates, resume, csv=csv, steps=4)
        sample_run(run, 2)
        losses = [common.result(summary, "heldout_diffusion") for summary in (sample.read_summary(run), resumed)]
        found["--resume_from_checkpoint"] = abs(losses[0] - losses[1])
        print(row, {name: f"{value:.1e}" for name, value in found.items()}, flush=True)
        assert max(found.values()) < 1e-4


@pytest.mark.parametrize("trains, uses", [("newest", "lowest"), ("lowest", "newest")])
def test_runs_are_loaded_and_resumed_by_other_versions(trains, uses, tmp_path):
    pythons = {"newest": os.environ["NEWEST_PYTHON"], "lowest": sys.executable}
    for python, task in ((pythons[trains], "train"), (pythons[uses], "use")):
        done = subprocess.run([python, __file__, task, tmp_path, phantoms()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    {"train": train, "use": use}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
