"""Stopped, killed and diverging trainings; `python tests/faults/run.py --rounds 100` is the long form of the kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from common import BASE, ROOT, arguments, pipeline_of, result, same, script_of, train, trained_weights

import train_full
import train_peft

LIMIT = 300
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=2"]


def start(row, folder, *flags, launcher=(), **options):
    """Start a run of a row with two processes, by accelerate's launcher."""
    launcher = launcher or ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--main_process_port=0"]
    command = [*LAUNCH, "--dynamo_backend=no", *launcher, script_of(row).__file__]
    command += arguments(row, folder, "--train_batch_size=1", *flags, **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, **output)


def wait_for(condition, process):
    began = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - began < LIMIT:
        time.sleep(0.01)
    assert condition(), process.communicate()[0]


def workers(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "train_" in " ".join(child.cmdline()[:3])]


def steps_of(run):
    return [int(path.name[11:]) for path in train_full.list_checkpoints(run)]


@pytest.fixture
def at_step(monkeypatch):
    """Return a function that calls `action` when the training loss is computed for the n-th time."""

    def arrange(n, action):
        calls = []

        def forward(self, batch, original=train_peft.DiffusionLoss.forward):
            losses = original(self, batch)
            calls.extend([n] * self.training)
            if self.training and len(calls) == n:
                losses = action(self, losses) or losses
            return losses

        monkeypatch.setattr(train_peft.DiffusionLoss, "forward", forward)
        monkeypatch.setattr(train_full.DiffusionLoss, "forward", forward)

    return arrange


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "row", "flag"),
    [
        (signal.SIGTERM, "lora", "--lora_dropout=0.3"),
        (signal.SIGUSR1, "unet", "--use_ema"),
        (signal.SIGINT, "bitfit", "--dataloader_num_workers=1"),
    ],
)
def test_a_signal_ends_training_after_a_checkpoint_and_nothing_is_lost(number, row, flag, at_step, tmp_path, capsys):
    flags = [flag, "--logging_steps=3"]
    whole = result(train(row, tmp_path / "whole", *flags, steps=5), "train_loss")
    at_step(2, lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        train(row, tmp_path / "cut", *flags, steps=5)
    assert ended.value.code == 75 and "stopped after step 3; continue with" in capsys.readouterr().out
    assert steps_of(tmp_path / "cut") == [3] and not (tmp_path / "cut" / "training_summary.json").exists()
    resumed = train(row, tmp_path / "cut", *flags, "--resume_from_checkpoint=latest", steps=5)
    assert result(resumed, "train_loss") == whole
    assert same(trained_weights(row, tmp_path / "cut"), trained_weights(row, tmp_path / "whole"))


def test_a_second_ctrl_c_stops_at_once(at_step, tmp_path):
    at_step(2, lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)] and None)
    with pytest.raises(KeyboardInterrupt):
        train("bitfit", tmp_path, steps=5)
    assert not steps_of(tmp_path) and not (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_two_processes_stop_together_die_together_and_continue_as_one(tmp_path):
    """SIGUSR1 to one of two processes, then SIGKILL to one; then one process with the same global batch."""
    run, flags = tmp_path / "cut", ["--checkpointing_steps=4", "--resume_from_checkpoint=latest"]
    process = start("bitfit", run, *flags, steps=400)
    wait_for(lambda: steps_of(run), process)
    workers(process)[1].send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=LIMIT)[0]
    assert process.returncode and said.count("stopped after step") == 1, said
    stopped = steps_of(run)[-1]
    process = start("bitfit", run, *flags, steps=400)
    wait_for(lambda: steps_of(run)[-1] > stopped, process)
    everything = psutil.Process(process.pid).children(recursive=True)
    workers(process)[1].kill()
    process.communicate(timeout=60)
    assert process.returncode and not psutil.wait_procs(everything, timeout=10)[1]
    steps = steps_of(run)[-1] + 4
    train("bitfit", run, *flags, "--train_batch_size=1", "--gradient_accumulation_steps=2", steps=steps)
    train("bitfit", tmp_path / "whole", "--train_batch_size=2", steps=steps)
    cut, whole, base = *(trained_weights("bitfit", tmp_path / name) for name in ("cut", "whole")), pipeline_of(BASE)
    moved = sum(
        (whole[name] - weight).square().sum() for name, weight in base.unet.state_dict().items() if name in whole
    )
    differing = sum((whole[name] - cut[name]).square().sum() for name in whole)
    assert moved > 0 and differing < 4e-4 * moved


@pytest.mark.slow
def test_two_machines_train_together(tmp_path):
    """Two launches with launch/accelerate/multi_machine.yaml on this machine give the weights of one process."""
    port = random.SystemRandom().randrange(20_000, 30_000)
    config = ["--config_file", ROOT / "launch/accelerate/multi_machine.yaml", "--mixed_precision=no"]
    config += ["--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    launchers = [[*config, f"--machine_rank={rank}"] for rank in range(2)]
    processes = [start("bitfit", tmp_path / "two", launcher=launcher, steps=3) for launcher in launchers]
    said = [process.communicate(timeout=LIMIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    train("bitfit", tmp_path / "one", steps=3)
    two, one = trained_weights("bitfit", tmp_path / "two"), trained_weights("bitfit", tmp_path / "one")
    assert max((two[name] - one[name]).abs().max().item() for name in one) < 1e-4


def test_the_slurm_job_passes_the_signal_on_and_queues_up_again(tmp_path):
    """launch/slurm/sweep.sh with stand-ins: a launcher whose script answers SIGUSR1 with 75, and SLURM's scontrol."""
    stubs, tree, record = tmp_path / "stubs", tmp_path / "tree", tmp_path / "record"
    stubs.mkdir()
    shutil.copytree(ROOT / "launch", tree / "launch", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tree / "CheXpert-v1.0").mkdir()
    (tree / "CheXpert-v1.0" / "train.csv").write_text("Path,Edema")
    # Not a shell script: shells cannot trap a signal that is ignored when they start.
    (tmp_path / "train.py").write_text(f"""
import pathlib, signal, sys, time
record = pathlib.Path({str(record)!r})
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(record.write_text("saved") and 75))
record.write_text("started")
time.sleep(300)
""")
    (stubs / "accelerate").write_text(f"#!/bin/sh\n{sys.executable} {tmp_path / 'train.py'}\nexit $?\n")
    (stubs / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "requeued"}\n')
    for path in stubs.iterdir():
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "VIRTUAL_ENV": str(stubs), "ROWS": "lora"}
    environment |= {"LABELS": "Edema", "SLURM_SUBMIT_DIR": str(tree), "SLURM_JOB_ID": "17"}
    job = subprocess.Popen(
        ["bash", ROOT / "launch/slurm/sweep.sh"], env=environment, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: record.exists() and record.read_text() == "started", job)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=LIMIT)[0]
    assert job.returncode == 75, said
    assert record.read_text() == "saved" and (tmp_path / "requeued").read_text() == "requeue 17\n"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("function", ["rmtree", "replace"])
def test_a_kill_while_checkpoints_change_leaves_no_partial_one(function, tmp_path, monkeypatch):
    """Kill while checkpoint-1 is deleted, or before checkpoint-3 has its name; the run then ends as if undisturbed."""
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=2"]
    train("bitfit", tmp_path / "whole", *flags, steps=4)
    module, victim, step, left = {
        "rmtree": (shutil, ".deleted-checkpoint", 1, [2, 3]),
        "replace": (os, ".checkpoint.tmp", 3, [1, 2]),
    }[function]
    original = getattr(module, function)

    def killed(path, *args, **options):
        state = Path(path) / "state.json"
        if state.parent.name == victim and state.exists() and json.loads(state.read_text())["step"] == step:
            state.unlink()
            raise Killed
        original(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, killed)
        train("bitfit", tmp_path / "run", *flags, steps=4)
    assert steps_of(tmp_path / "run") == left
    for checkpoint in train_full.list_checkpoints(tmp_path / "run"):
        names = sorted(path.name for path in checkpoint.iterdir())
        assert names == ["optimizer.safetensors", "state.json", "trainable.safetensors"]
    train("bitfit", tmp_path / "run", *flags, "--resume_from_checkpoint=latest", steps=4)
    assert steps_of(tmp_path / "run") == [3, 4]
    assert same(trained_weights("bitfit", tmp_path / "run"), trained_weights("bitfit", tmp_path / "whole"))


def test_a_run_that_diverges_writes_no_more_checkpoints(at_step, tmp_path, capsys):
    """The third step's loss is finite and its gradient is not, between logging steps, with a checkpoint due."""

    def broken(loss, losses):
        zero = next(p for p in loss.parameters() if p.requires_grad).sum() * 0
        return losses | {"loss": losses["loss"] + torch.sqrt(zero)}

    at_step(3, broken)
    with pytest.raises(SystemExit) as ended:
        train("bitfit", tmp_path, "--checkpointing_steps=1", "--logging_steps=50", steps=50)
    assert ended.value.code == 2 and "error: diverged by step 3: loss" in capsys.readouterr().err
    assert steps_of(tmp_path) == [1, 2] and not (tmp_path / "training_summary.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Random kills
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_scripts_survive_random_kills():
    command = [sys.executable, ROOT / "tests/faults/run.py", "--rounds=40", "--kills=4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and " 0 failures" in done.stdout, done.stdout + done.stderr
