"""Real launches: several processes, signals, and what a run prints and leaves."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from common import ROOT, ROWS, arguments, launch, phantoms, result, same, script_of, train, trained_weights
from safetensors.torch import load_file


def fast_and_slow(*fast):
    return [row if row in fast else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize("row", fast_and_slow("unet_vae"))
def test_two_processes_train_as_one_does(row, tmp_path):
    """Two processes with two accumulated batches of 1, one with batches of 4. An odd number of held-out images."""
    options = ["--max_train_samples=8", "--max_validation_samples=3", "--checkpointing_steps=2", "--use_ema"]
    one = train(row, tmp_path / "one" / "run", *options, "--train_batch_size=4", steps=2)
    layout = ["--train_batch_size=1", "--gradient_accumulation_steps=2"]
    argv = arguments(row, tmp_path / "two" / "run", *options, *layout, steps=2)
    done = launch(script_of(row).__file__, *argv, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for file, suffix in (("trainable", ""), ("ema", ""), ("optimizer", "exp_avg"), ("optimizer", "exp_avg_sq")):
        paths = [tmp_path / name / "run" / "checkpoint-2" / f"{file}.safetensors" for name in ("one", "two")]
        # All together: some weights have gradients that are rounding and nothing else.
        alone, shared = (
            torch.cat([t.flatten() for n, t in sorted(load_file(p).items()) if n.endswith(suffix)]) for p in paths
        )
        assert (alone - shared).norm() < (1e-3 if suffix else 1e-5) * alone.norm(), (file, suffix)
    two = json.loads((tmp_path / "two" / "run" / "training_summary.json").read_text())
    assert two["num_processes"] == 2 and two["global_batch_size"] == one["global_batch_size"] == 4
    for metric in ("heldout_diffusion_start", "heldout_diffusion", "train_loss"):
        assert result(two, metric) == pytest.approx(result(one, metric), rel=1e-4)


def wait_for_checkpoint(process, run, after=0):
    """Wait until a run has written a checkpoint later than a step."""
    while process.poll() is None and not any(int(p.name[11:]) > after for p in run.glob("checkpoint-*")):
        time.sleep(0.01)
    assert process.poll() is None


@pytest.mark.parametrize("row", fast_and_slow("bitfit"))
def test_a_run_that_was_killed_and_preempted_ends_bit_identically(row, tmp_path):
    """SIGKILL, then SIGTERM, in the middle of an epoch; `latest` continues from the last checkpoint."""
    options, steps = ["--checkpointing_steps=3", "--max_train_samples=7"], 16
    train(row, tmp_path / "whole", *options, steps=steps)
    resume, run = "--resume_from_checkpoint=latest", tmp_path / "run"

    def start(*more):
        command = [sys.executable, script_of(row).__file__, *arguments(row, run, *options, *more, steps=steps)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = start()
    wait_for_checkpoint(killed, run)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    preempted = start(resume)
    wait_for_checkpoint(preempted, run, max(int(path.name[11:]) for path in run.glob("checkpoint-*")))
    preempted.send_signal(signal.SIGTERM)
    out, _ = preempted.communicate()
    assert preempted.returncode == script_of(row).EXIT_PREEMPTED == 75
    assert "continue with --resume_from_checkpoint latest" in out
    assert not (run / "training_summary.json").exists()
    assert train(row, run, *options, resume, steps=steps)["steps"] == steps
    assert same(trained_weights(row, tmp_path / "whole"), trained_weights(row, run))


def test_a_launch_leaves_a_complete_run_and_prints_little(tmp_path):
    flags = ["--report_to=tensorboard", "--num_validation_images=1", "--checkpointing_steps=2"]
    done = launch(ROOT / "train_peft.py", *arguments("lora", tmp_path / "run", *flags, steps=3))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) < 16 and str(phantoms()) in done.stdout
    lines = [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if line.strip() and "image/s" not in line and "step/s" not in line
    ]
    # What accelerate's launcher says about its own defaults is not the script's.
    assert [
        line for line in lines if "accelerate launch" not in line and line[0] != "\t" and "--dynamo" not in line
    ] == []
    names = {path.name for path in (tmp_path / "run").iterdir()}
    results = {"README.md", "training_summary.json", "pytorch_lora_weights.safetensors", "validation", "logs"}
    assert names == {*results, "checkpoint-2", "checkpoint-3"}
    pictures = {path.name for path in (tmp_path / "run" / "validation").iterdir()}
    assert pictures == {"step-000000.png", "step-000003.png"}
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
