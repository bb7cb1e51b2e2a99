"""Several processes, and processes that are killed: what only real launches show."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from common import BASE, ROOT, ROWS, arguments, launch, phantoms, pipeline_of, script_of, trained_weights, weights_of
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """All rows on two processes with two accumulated batches of 1, and on one with batches of 4, in one launch each."""
    folders = {}
    for processes, batch_size, accumulation in ((2, 1, 2), (1, 4, 1)):
        folders[processes] = tmp_path_factory.mktemp(f"processes-{processes}")
        done = launch(ROOT / "tests/probe.py", folders[processes], phantoms(), batch_size, accumulation, *ROWS, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("row", ROWS)
def test_two_processes_share_the_work_of_one(row, launches):
    seen = [json.loads((launches[2] / row / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((launches[1] / row / "seen-0.json").read_text())
    # One epoch of twelve images: each once, half of them on each process, and the noise and timesteps that one process has.
    assert len(seen[0]) == len(seen[1]) == 6
    images = [image for part in seen for _, image, _, _ in part]
    assert len(set(images)) == 12
    assert len({noise for part in seen for _, _, noise, _ in part}) == 12
    assert sorted(seen[0] + seen[1]) == sorted(alone)


@pytest.mark.parametrize("row", ROWS)
def test_two_processes_end_with_the_weights_of_one(row, launches):
    first, second = (load_file(launches[2] / row / f"rank-{rank}.safetensors") for rank in (0, 1))
    alone = load_file(launches[1] / row / "rank-0.safetensors")
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max((first[name] - alone[name]).abs().max().item() for name in first) < 1e-4
    base = {name: w for name, w in weights_of(pipeline_of(BASE)).items() if name in alone}
    # The second low-rank matrix starts from zero.
    base |= {name: torch.zeros_like(w) for name, w in alone.items() if "lora_B" in name}
    # The weights barely move in three steps, so what moved has to agree as well. AdamW turns rounding into whole steps
    # where a gradient is zero but for rounding (the keys' biases), hence the per cent.
    assert base
    moved = sum((alone[name] - base[name]).square().sum() for name in base).sqrt()
    differing = sum((alone[name] - first[name]).square().sum() for name in base).sqrt()
    assert differing < 0.01 * moved


def heldout_losses(run) -> dict[str, float]:
    """The held-out losses of a finished run, before and after."""
    results = json.loads((run / "training_summary.json").read_text())["results"]
    names = {"heldout_diffusion_start", "heldout_diffusion", "heldout_reconstruction_start", "heldout_reconstruction"}
    return {r["metric"]: r["value"] for r in results if r["metric"] in names}


def test_fsdp_trains_as_plain_processes_do(tmp_path):
    """--fsdp: the same checkpoints, from which a run goes on with it or without, the same held-out losses and pictures."""
    row = "unet_vae_text_encoder"

    def run(name: str, *more) -> dict[str, torch.Tensor]:
        # An odd number of held-out images, so that the processes run the model unequally often.
        options = [
            "--max_grad_norm=0.01", "--gradient_checkpointing", "--gradient_accumulation_steps=2", "--checkpointing_steps=2", "--validation_steps=2", "--max_validation_samples=5",
            "--num_validation_images=1", "--use_ema", "--unet_lr=1e-3", "--vae_lr=1e-4", "--text_encoder_lr=1e-4",
        ]  # fmt: skip
        done = launch(ROOT / "train_full.py", *arguments(row, tmp_path / name, *options, *more, steps=4), processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
        saved = {part: load_file(tmp_path / name / "checkpoint-4" / f"{part}.safetensors") for part in ("trainable", "ema", "optimizer")}
        saved["pipeline"] = trained_weights(row, tmp_path / name)
        return {f"{part}/{key}": tensor for part, tensors in saved.items() for key, tensor in tensors.items()}

    plain, sharded = run("plain"), run("sharded", "--fsdp")
    from_plain = run("from_plain", "--fsdp", f"--resume_from_checkpoint={tmp_path / 'plain' / 'checkpoint-2'}")
    from_sharded = run("from_sharded", f"--resume_from_checkpoint={tmp_path / 'sharded' / 'checkpoint-2'}")
    moved = max((plain[f"trainable/{name}"] - w).abs().max() for name, w in weights_of(pipeline_of(BASE)).items())
    assert moved > 1e-3
    for other in (sharded, from_plain, from_sharded):
        assert other.keys() == plain.keys()
        assert max((plain[name] - other[name]).abs().max() for name in plain) < moved / 100
        # The moments against their own size: a sum in the place of a mean would not show in AdamW's weights. All together, since
        # some weights have gradients that are nothing but rounding.
        for kind in ("exp_avg", "exp_avg_sq"):
            pair = [torch.cat([w[name].flatten() for name in plain if name.endswith(f"/{kind}")]) for w in (plain, other)]
            assert (pair[0] - pair[1]).norm() < 1e-3 * pair[0].norm()
    assert heldout_losses(tmp_path / "sharded") == pytest.approx(heldout_losses(tmp_path / "plain"), rel=1e-4)
    assert len(heldout_losses(tmp_path / "plain")) == 4
    pictures = [np.array(Image.open(tmp_path / name / "validation" / "step-000004.png")).astype(int) for name in ("plain", "sharded")]
    assert abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("row", ["bitfit", "unet_vae"])
def test_killed_run_resumes_bit_identically(row, tmp_path):
    """SIGKILL in the middle of an epoch and of an accumulation; `latest` goes on from the last whole checkpoint."""
    script = script_of(row)
    options = ["--gradient_accumulation_steps=2", "--checkpointing_steps=3", "--max_train_samples=7"]

    def command(folder, *more):
        return [sys.executable, script.__file__, *arguments(row, tmp_path / folder, *options, *more, steps=40)]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    victim = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while not list((tmp_path / "killed").glob("checkpoint-*")) and victim.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "training_summary.json").exists()
    # Without being told to go on, a second start does not overwrite what is there.
    again = subprocess.run(command("killed"), capture_output=True, text=True, env=environment)
    assert again.returncode == 2 and "already holds a run" in again.stderr
    resumed = subprocess.run(command("killed", "--resume_from_checkpoint=latest"), capture_output=True, text=True, env=environment)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "going on from" in resumed.stdout
    whole, killed = trained_weights(row, tmp_path / "whole"), trained_weights(row, tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_launch_leaves_a_complete_run_and_says_little(tmp_path):
    done = launch(
        ROOT / "train_peft.py", *arguments("lora", tmp_path / "run", "--report_to=tensorboard", "--num_validation_images=1", steps=3)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plan = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert plan == ["data", "train", "held", "base", "trains", "steps", "cached", "device", "output"]
    noise = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    # What accelerate's launcher says about its own defaults is not the script's.
    assert [line for line in noise if "accelerate launch" not in line and not line.startswith("\t") and "--dynamo" not in line] == []
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"README.md", "training_summary.json", "pytorch_lora_weights.safetensors", "validation", "logs"}
    assert {p.name for p in (tmp_path / "run" / "validation").iterdir()} == {"step-000000.png", "step-000003.png"}
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
