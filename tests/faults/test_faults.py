"""The faults that a long job meets, one by one and in short; `python tests/faults/run.py --rounds 100` is the long form."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from common import BASE, ROOT, arguments, phantoms, pipeline_of, result, script_of, train, trained_weights, weights_of
from safetensors.torch import load_file, save_file
from test_bad_input import change_weights, small_table

import train_full
import train_peft

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A hang is longer than this on any machine.
LIMIT = 300


def start(row, folder, *flags, processes=1, machines=1, **options) -> list[subprocess.Popen]:
    """A short run of a row in processes of its own: the script itself, or a launcher of several, or one on each of two machines."""
    script = [script_of(row).__file__, *arguments(row, folder, *flags, **options)]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", processes, "--mixed_precision", "no"]
    commands = [[sys.executable, *script]]
    if processes > 1:
        commands = [[*launcher, "--multi_gpu", "--num_machines", 1, "--dynamo_backend", "no", "--main_process_port", 0, *script]]
    if machines > 1:
        # As users start it, with a port that is known to both, at random since the file's own may be taken.
        port = random.SystemRandom().randrange(20_000, 30_000)
        launcher += ["--config_file", ROOT / "launch/accelerate/multi_machine.yaml", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        commands = [[*launcher, "--machine_rank", rank, *script] for rank in range(machines)]
    return [
        subprocess.Popen([str(word) for word in command], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        for command in commands
    ]  # fmt: skip


def output_of(process) -> str:
    """What a process says until it ends, which has to be soon."""
    try:
        return process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        raise AssertionError("hangs") from None


def wait_for(path, process) -> None:
    """Until a file is there, while the process that is to write it lives."""
    began = time.monotonic()
    while not path.exists() and process.poll() is None and time.monotonic() - began < LIMIT:
        time.sleep(0.01)
    assert path.exists(), process.communicate()[0]


def workers(process) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "train_" in " ".join(child.cmdline()[:3])]


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refused(row, folder, *flags, capsys, **options) -> str:
    """The one sentence that a run in this process ends with."""
    script = script_of(row)
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        script.main(script.parse_args(arguments(row, folder, *flags, **options)))
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# Pre-emption
# ----------------------------------------------------------------------------------------------------------------------


def test_signals_end_training_after_a_checkpoint_and_nothing_is_lost(tmp_path):
    """SIGTERM to all of a run's processes, a loader's worker included; then SIGUSR1; then to the end."""
    flags = ["--checkpointing_steps=10", "--latent_cache_dir=none", "--dataloader_num_workers=1", "--resume_from_checkpoint=latest"]
    for number, step in ((signal.SIGTERM, 10), (signal.SIGUSR1, 20)):
        (process,) = start("bitfit", tmp_path / "cut", *flags, steps=60)
        wait_for(tmp_path / "cut" / f"checkpoint-{step}", process)
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        said = output_of(process)
        assert process.returncode == train_full.STOPPED == 75, said
        assert f"stopped by {number.name} after step" in said and "Traceback" not in said
        assert train_full.checkpoint_problem(train_full.list_checkpoints(tmp_path / "cut")[-1]) is None
    train("bitfit", tmp_path / "cut", *flags, steps=60)
    train("bitfit", tmp_path / "whole", "--latent_cache_dir=none", steps=60)
    assert equal(trained_weights("bitfit", tmp_path / "cut"), trained_weights("bitfit", tmp_path / "whole"))


@pytest.mark.parametrize("row", ["bitfit", "unet"])
def test_several_processes_stop_together_die_together_and_go_on_as_one(row, tmp_path):
    """A signal to one of two processes; SIGKILL to one; then another number of processes with the same global batch."""
    flags = ["--train_batch_size=1", "--checkpointing_steps=4", "--resume_from_checkpoint=latest"]
    (process,) = start(row, tmp_path / "cut", *flags, processes=2, steps=400)
    wait_for(tmp_path / "cut" / "checkpoint-4", process)
    workers(process)[1].send_signal(signal.SIGUSR1)
    said = output_of(process)
    assert process.returncode and said.count("stopped by SIGUSR1 after step") == 1, said
    stopped = train_full.list_checkpoints(tmp_path / "cut")[-1]
    assert train_full.checkpoint_problem(stopped) is None
    (process,) = start(row, tmp_path / "cut", *flags, processes=2, steps=400)
    wait_for(tmp_path / "cut" / f"checkpoint-{int(stopped.name[11:]) // 4 * 4 + 8}", process)
    everything = psutil.Process(process.pid).children(recursive=True)
    workers(process)[1].kill()
    began = time.monotonic()
    said = output_of(process)
    assert time.monotonic() - began < 60 and not psutil.wait_procs(everything, timeout=10)[1]
    assert "SIGKILL" in said and "another process of this run has ended" in said, said
    last = train_full.list_checkpoints(tmp_path / "cut")[-1]
    assert train_full.checkpoint_problem(last) is None
    steps = int(last.name[11:]) + 4
    train(row, tmp_path / "cut", *flags, "--gradient_accumulation_steps=2", steps=steps)
    train(row, tmp_path / "whole", "--train_batch_size=2", steps=steps)
    cut, whole, pipeline = (trained_weights(row, tmp_path / "cut"), trained_weights(row, tmp_path / "whole"), pipeline_of(BASE))
    base = pipeline.unet.state_dict() | weights_of(pipeline)
    moved = sum((whole[name] - base[name]).square().sum() for name in whole).sqrt()
    differing = sum((whole[name] - cut[name]).square().sum() for name in whole).sqrt()
    assert 0 < moved and differing < 0.02 * moved


def test_two_machines_train_together(tmp_path):
    """Two launches with launch/accelerate/multi_machine.yaml on the loopback address end with the weights of one process."""
    launches = start("bitfit", tmp_path / "two", "--train_batch_size=1", processes=2, machines=2, steps=3)
    said = [output_of(process) for process in launches]
    assert [process.returncode for process in launches] == [0, 0], said
    assert sum("1 x 2 processes" in text for text in said) == 1
    train("bitfit", tmp_path / "one", "--train_batch_size=2", steps=3)
    two, one = trained_weights("bitfit", tmp_path / "two"), trained_weights("bitfit", tmp_path / "one")
    assert max((two[name] - one[name]).abs().max().item() for name in one) < 1e-4


def test_the_cluster_job_passes_the_signal_on_and_queues_up_again(tmp_path):
    """launch/slurm/sweep.sh with stand-ins: a script that answers SIGUSR1 with 75, and SLURM's scontrol."""
    stubs, tree = tmp_path / "stubs", tmp_path / "tree"
    stubs.mkdir()
    shutil.copytree(ROOT / "launch", tree / "launch", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tree / "CheXpert-v1.0").mkdir()
    (tree / "CheXpert-v1.0" / "train.csv").touch()
    answer = "import pathlib, signal, sys, time\nrecord = pathlib.Path({!r})\ndef saved(*_):\n    record.write_text('saved')\n    sys.exit(75)\nsignal.signal(signal.SIGUSR1, saved)\nrecord.write_text('started')\ntime.sleep(300)\n"
    (tmp_path / "train.py").write_text(answer.format(str(tmp_path / "record")))
    # Like the launcher, a process in between that does not know the signal.
    (stubs / "accelerate").write_text(f"#!/bin/sh\n{sys.executable} {tmp_path / 'train.py'}\nexit $?\n")
    (stubs / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "requeued"}\n')
    for path in stubs.iterdir():
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "VIRTUAL_ENV": str(stubs), "SLURM_SUBMIT_DIR": str(tree), "SLURM_JOB_ID": "17", "ROWS": "lora"}
    job = subprocess.Popen(["bash", ROOT / "launch/slurm/sweep.sh"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "record", job)
    while (tmp_path / "record").read_text() != "started":
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    said = output_of(job)
    assert job.returncode == 75, said
    assert (tmp_path / "record").read_text() == "saved" and (tmp_path / "requeued").read_text() == "requeue 17\n"


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda folder: (folder / "trainable.safetensors").write_bytes((folder / "trainable.safetensors").read_bytes()[:-20]),
    "bit flipped": lambda folder: flip_a_bit(folder / "optimizer.safetensors"),
    "empty": lambda folder: (folder / "ema.safetensors").write_bytes(b""),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "another state": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text().replace('"step": 3', '"step": 2')),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:50]),
    "a list for a manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a manifest of nothing": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    """A run of four steps with a checkpoint after the first three, and its weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train("bitfit", folder / "run", "--checkpointing_steps=1", "--checkpoints_total_limit=9", "--use_ema", steps=4)
    weights = trained_weights("bitfit", folder / "run")
    for name in ("checkpoint-4", "training_summary.json", "README.md", "unet_delta.safetensors"):
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "run", weights


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_never_resumed_from(damage, three_checkpoints, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(three_checkpoints[0], run)
    DAMAGES[damage](run / "checkpoint-3")
    args = train_peft.parse_args(arguments("bitfit", run, "--use_ema", "--resume_from_checkpoint=latest"))
    notes = []
    assert train_peft.find_checkpoint(args, run, notes) == run / "checkpoint-2"
    assert len(notes) == 1 and f"{run / 'checkpoint-3'} is passed over" in notes[0]
    with pytest.raises(SystemExit) as ended:
        train_peft.find_checkpoint(train_peft.argparse.Namespace(**vars(args) | {"resume_from_checkpoint": str(run / "checkpoint-3")}), run, [])
    assert ended.value.code == 2 and "is missing or damaged" in capsys.readouterr().err


SPOILT = {
    "moments of another shape": ("optimizer", lambda tensors: tensors.update({name: torch.zeros(3, 5) for name in [n for n in tensors if n.endswith("exp_avg")][:1]})),
    "moments that are not finite": ("optimizer", lambda tensors: next(t for n, t in tensors.items() if n.endswith("exp_avg_sq")).fill_(float("nan"))),
    "moments that are gone": ("optimizer", lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("exp_avg_sq")]),
    "an average without a name": ("ema", lambda tensors: tensors.pop(next(iter(tensors)))),
    "an average that is not finite": ("ema", lambda tensors: next(iter(tensors.values())).fill_(float("inf"))),
    "weights of another shape": ("trainable", lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3, 5)})),
    "a negative step": ("state", lambda state: state.update(step=-1)),
    "a wrong count": ("state", lambda state: state.update(ema_steps="three")),
    "no count of the average": ("state", lambda state: state.update(ema_steps=None)),
    "a loss that is no number": ("state", lambda state: state.update(loss_sum="low")),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_checkpoint_that_was_made_up_is_refused(what, three_checkpoints, tmp_path, capsys):
    """Its manifest fits, as whoever makes up the files can make up that too."""
    run = tmp_path / "run"
    shutil.copytree(three_checkpoints[0], run)
    part, spoil = SPOILT[what]
    folder = run / "checkpoint-3"
    if part == "state":
        state = json.loads((folder / "state.json").read_text())
        spoil(state)
        (folder / "state.json").write_text(json.dumps(state))
    else:
        tensors = load_file(folder / f"{part}.safetensors")
        spoil(tensors)
        save_file(tensors, folder / f"{part}.safetensors")
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps({"files": {path.name: train_full.describe_file(path) for path in files}}))
    sentence = refused("bitfit", run, "--use_ema", "--resume_from_checkpoint=latest", capsys=capsys, steps=4)
    assert "checkpoint-3" in sentence and "resume from another checkpoint" in sentence or "do not match what trains" in sentence


def test_a_checkpoint_from_elsewhere_overwrites_no_finished_run(three_checkpoints, tmp_path, capsys):
    """Going on from another folder's checkpoint is a start in this one."""
    resume = f"--resume_from_checkpoint={three_checkpoints[0] / 'checkpoint-3'}"
    train("bitfit", tmp_path / "done")
    before = (tmp_path / "done" / "unet_delta.safetensors").read_bytes()
    assert "already holds a run" in refused("bitfit", tmp_path / "done", "--use_ema", resume, capsys=capsys, steps=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    assert "README.md would be overwritten" in refused("bitfit", tmp_path / "mine", "--use_ema", resume, capsys=capsys, steps=4)
    assert (tmp_path / "done" / "unet_delta.safetensors").read_bytes() == before and (tmp_path / "mine" / "README.md").read_text() == "mine"
    train("bitfit", tmp_path / "new", "--use_ema", resume, steps=4)
    assert equal(trained_weights("bitfit", tmp_path / "new"), three_checkpoints[1])


def test_a_finished_run_whose_checkpoints_are_damaged_is_not_begun_anew(three_checkpoints, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(three_checkpoints[0], run)
    (run / "training_summary.json").write_text("{}")
    for checkpoint in train_full.list_checkpoints(run):
        flip_a_bit(checkpoint / "trainable.safetensors")
    assert "already holds a run" in refused("bitfit", run, "--use_ema", "--resume_from_checkpoint=latest", capsys=capsys, steps=4)


def test_a_kill_while_an_old_checkpoint_goes_leaves_no_part_of_it(three_checkpoints, tmp_path, monkeypatch):
    """Found by a random kill: what is left has no checkpoint's name, and goes with the next start."""
    run = tmp_path / "run"
    shutil.copytree(three_checkpoints[0], run)

    class Killed(BaseException):
        pass

    def begun(path, ignore_errors=False):
        if Path(path).exists():
            (Path(path) / "manifest.json").unlink()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", begun)
        train_peft.remove_checkpoint(run / "checkpoint-1")
    assert [train_peft.checkpoint_problem(path) for path in train_peft.list_checkpoints(run)] == [None, None]
    assert len(list(run.glob(".checkpoint-*"))) == 1
    train("bitfit", run, "--use_ema", "--resume_from_checkpoint=latest", steps=4)
    assert not list(run.glob(".checkpoint-*"))
    assert equal(trained_weights("bitfit", run), three_checkpoints[1])


def test_a_disk_that_cannot_be_read_is_a_damaged_checkpoint(three_checkpoints, monkeypatch):
    """Reading from an open file names no file."""

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(train_full, "describe_file", failing)
    assert train_full.checkpoint_problem(three_checkpoints[0] / "checkpoint-3") == f"checkpoint-3: {os.strerror(errno.EIO)}"


def test_the_training_loss_survives_interruptions(tmp_path):
    """In the middle of a logging window, and after the last step."""
    flags = ["--checkpointing_steps=2", "--checkpoints_total_limit=9", "--logging_steps=50"]
    whole = result(train("bitfit", tmp_path / "run", *flags, steps=5), "train_loss")
    for lost in ([], ["checkpoint-5"]):
        for name in ("training_summary.json", *lost):
            path = tmp_path / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert result(train("bitfit", tmp_path / "run", *flags, "--resume_from_checkpoint=latest", steps=5), "train_loss") == whole


def test_pruning_leaves_the_last_good_checkpoint_and_the_run_ends_the_same(three_checkpoints, tmp_path, capsys):
    """With a later checkpoint that is damaged and room for one: what is written is not pruned in its favour."""
    run, weights = tmp_path / "run", three_checkpoints[1]
    shutil.copytree(three_checkpoints[0], run)
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        flip_a_bit(run / name / "trainable.safetensors")
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-9")
    kept = []

    def seen(accelerator, state, output_dir, limit, save=train_peft.save_checkpoint):
        save(accelerator, state, output_dir, limit)
        kept.append([path.name for path in train_peft.list_checkpoints(output_dir) if not train_peft.checkpoint_problem(path)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_peft, "save_checkpoint", seen)
        train("bitfit", run, "--checkpointing_steps=1", "--checkpoints_total_limit=1", "--use_ema", "--resume_from_checkpoint=latest", steps=4)
    said = capsys.readouterr().out
    assert said.count("is passed over") == 4 and "so the run starts anew" in said
    assert kept == [[f"checkpoint-{step}"] for step in (1, 2, 3, 4)]
    assert equal(trained_weights("bitfit", run), weights)


@contextlib.contextmanager
def small_disk(folder, megabytes: int):
    """A folder with little room: a file system of its own where that is allowed, else a limit on the size of a file."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True).returncode == 0:
        try:
            yield True
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 18, hard))
    try:
        yield False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_with_a_sentence_and_the_checkpoint_before_it(tmp_path, capsys):
    with small_disk(tmp_path / "small", 40) as mounted:
        flags = ["--checkpointing_steps=1", f"--latent_cache_dir={tmp_path / 'cache'}"]
        sentence = refused("unet", tmp_path / "small" / "run", *flags, capsys=capsys, steps=3)
        assert "cannot be written" in sentence and "make room and go on" in sentence
        left = train_full.list_checkpoints(tmp_path / "small" / "run")
        assert [path.name for path in left] == (["checkpoint-1"] if mounted else [])
        assert not any(train_full.checkpoint_problem(path) for path in left)
        assert not list((tmp_path / "small").rglob("*.part"))


def test_a_full_disk_while_latents_and_captions_are_cached(tmp_path, capsys):
    with small_disk(tmp_path / "small", 1) as mounted:
        if mounted:
            (tmp_path / "small" / "others").write_bytes(bytes(1_000_000))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        sentence = refused("bitfit", tmp_path / "run", f"--latent_cache_dir={tmp_path / 'small' / 'cache'}", capsys=capsys)
        assert "make room" in sentence and "start again" in sentence
        assert not list((tmp_path / "small").rglob("*.npy")) and not list((tmp_path / "small").rglob("*.part"))


@pytest.mark.parametrize(
    "error, words",
    [
        (train_full.BadImage("Caught BadImage in worker\nTraceback ...\n__main__.BadImage: two\nlines.png: no such file"), "two\nlines.png: no such file"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lower --dataloader_num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "lower --dataloader_num_workers"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] writev: Broken pipe"), "another process of this run has ended"),
    ],
)
def test_errors_that_are_no_fault_of_the_code_have_a_sentence(error, words):
    assert words in train_full.plain_sentence(error, "lower --train_batch_size")
    assert train_full.plain_sentence(RuntimeError("size mismatch"), "") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_while_the_results_are_saved(number, tmp_path, capsys, monkeypatch):
    def full(path, text, write_text=train_peft.write_text):
        if path.name == "README.md":
            raise OSError(number, os.strerror(number), str(path))
        write_text(path, text)

    monkeypatch.setattr(train_peft, "write_text", full)
    sentence = refused("bitfit", tmp_path / "run", "--checkpointing_steps=1", capsys=capsys)
    assert os.strerror(number) in sentence and "README.md" in sentence
    assert train_full.checkpoint_problem(tmp_path / "run" / "checkpoint-2") is None
    assert not (tmp_path / "run" / "training_summary.json").exists()


def test_a_folder_that_is_read_only(tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        if os.geteuid() == 0:
            pytest.skip("nothing is read-only for root, who may not mount here")
        folder.chmod(0o500)
    try:
        assert "cannot be written" in refused("bitfit", folder / "run", f"--latent_cache_dir={tmp_path / 'cache'}", capsys=capsys)
    finally:
        subprocess.run(["umount", folder], capture_output=True)


# ----------------------------------------------------------------------------------------------------------------------
# Divergence and memory
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_writes_no_more_checkpoints(what, tmp_path, capsys, monkeypatch):
    """The third step breaks; a checkpoint is due before the loss is next read."""
    calls = []

    def broken(self, batch, forward=train_peft.DiffusionLoss.forward):
        losses = forward(self, batch)
        if self.training:
            calls.append(1)
            if len(calls) == 3 and what == "loss":
                losses["loss"] = losses["loss"] * float("nan")
            elif len(calls) == 3:
                # A finite loss whose gradient is not.
                zero = next(p for p in self.parameters() if p.requires_grad).sum() * 0
                losses["loss"] = losses["loss"] + torch.sqrt(zero)
        return losses

    monkeypatch.setattr(train_peft.DiffusionLoss, "forward", broken)
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=1", "--logging_steps=50", "--learning_rate=3e-4"]
    sentence = refused("bitfit", tmp_path / "run", *flags, capsys=capsys, steps=50)
    assert "diverged by step 3" in sentence and "learning rate 3.0e-04" in sentence and "go on from checkpoint-2" in sentence
    assert [path.name for path in train_full.list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "training_summary.json").exists()
    monkeypatch.undo()
    train("bitfit", tmp_path / "run", "--checkpointing_steps=1", "--learning_rate=3e-4", "--resume_from_checkpoint=latest", steps=4)
    train("bitfit", tmp_path / "whole", "--learning_rate=3e-4", steps=4)
    assert equal(trained_weights("bitfit", tmp_path / "run"), trained_weights("bitfit", tmp_path / "whole"))


@pytest.mark.parametrize("where", ["device", "host"])
def test_too_little_memory_says_what_to_lower(where, tmp_path, capsys, monkeypatch):
    def hungry(self, batch):
        if where == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        # More than any machine has; torch's own error.
        return torch.empty(1 << 55)

    monkeypatch.setattr(train_full.DiffusionLoss, "forward", hungry)
    sentence = refused("unet", tmp_path / "run", "--max_validation_samples=1", capsys=capsys)
    assert "out of memory" in sentence and all(flag in sentence for flag in ("--train_batch_size", "--gradient_checkpointing", "--resolution"))


# ----------------------------------------------------------------------------------------------------------------------
# Images, clocks, secrets
# ----------------------------------------------------------------------------------------------------------------------


def test_bad_images_are_skipped_told_once_and_counted(tmp_path, capsys):
    table = small_table(tmp_path)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    images[0].unlink()
    # Whole by its header and its end, which is all that is looked at without the flag.
    images[3].write_bytes(images[3].read_bytes()[:200] + images[3].read_bytes()[-300:])
    summary = train("bitfit", tmp_path / "run", "--split=all", "--on_bad_image=skip", csv=table)
    said = capsys.readouterr().out
    assert summary["images"] == 10 and summary["left_out"]["unreadable"] == 2
    assert said.count(f"skipped  {images[0]}: no such file") == 1 and said.count(f"skipped  {images[3]}: cannot be decoded") == 1
    for image in images:
        image.unlink(missing_ok=True)
    assert "none of 12 images can be used" in refused("bitfit", tmp_path / "none", "--split=all", "--on_bad_image=skip", capsys=capsys, csv=table)


def test_an_image_that_vanishes_before_it_is_encoded_ends_with_a_sentence(tmp_path, capsys, monkeypatch):
    table = small_table(tmp_path)
    gone = sorted((tmp_path / "images").rglob("*.jpg"))[5]

    def check(*args, check_images=train_peft.check_images):
        found = check_images(*args)
        gone.unlink()
        return found

    monkeypatch.setattr(train_peft, "check_images", check)
    sentence = refused("bitfit", tmp_path / "run", "--split=all", capsys=capsys, csv=table)
    assert str(gone) in sentence and "cannot be read any more" in sentence and not (tmp_path / "run").exists()


def test_an_image_that_vanishes_in_training_has_the_next_in_its_place(tmp_path, capsys, monkeypatch):
    """Whoever draws the sample, in this process or a loader's; the same weights whatever the layout of the batch."""
    table = small_table(tmp_path)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    images[5].unlink()
    monkeypatch.setattr(train_peft, "check_images", lambda *_: [])
    assert str(images[5]) in refused("bitfit", tmp_path / "stopped", "--split=all", "--latent_cache_dir=none", capsys=capsys, csv=table, steps=6)
    layouts = (["--train_batch_size=4"], ["--train_batch_size=2", "--gradient_accumulation_steps=2"], ["--train_batch_size=4", "--dataloader_num_workers=2"])
    for i, layout in enumerate(layouts):
        capsys.readouterr()
        summary = train("bitfit", tmp_path / f"run-{i}", "--split=all", "--latent_cache_dir=none", "--on_bad_image=skip", *layout, csv=table, steps=6)
        assert capsys.readouterr().out.count(f"skipped  {images[5]}: cannot be read any more") == 1
        assert summary["left_out"]["unreadable later, replaced by the next"] == 1
    one, two, three = (trained_weights("bitfit", tmp_path / f"run-{i}") for i in range(3))
    assert equal(one, three) and max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


def test_two_processes_leave_out_bad_images_together(tmp_path):
    """Told once, counted once, and the same images trained on as on one process."""
    table = small_table(tmp_path)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    images[0].unlink()
    images[3].write_bytes(images[3].read_bytes()[:200] + images[3].read_bytes()[-300:])
    flags = ["--split=all", "--on_bad_image=skip"]
    (process,) = start("bitfit", tmp_path / "two", *flags, "--train_batch_size=1", processes=2, csv=table, steps=5)
    said = output_of(process)
    assert process.returncode == 0 and [said.count(str(images[i])) for i in (0, 3)] == [1, 1], said
    assert f"skipped  {images[0]}: no such file" in said and f"skipped  {images[3]}: cannot be decoded" in said
    summary = json.loads((tmp_path / "two" / "training_summary.json").read_text())
    assert summary["images"] == 10 and summary["left_out"]["unreadable"] == 2
    train("bitfit", tmp_path / "one", *flags, csv=table, steps=5)
    two, one = trained_weights("bitfit", tmp_path / "two"), trained_weights("bitfit", tmp_path / "one")
    assert max((two[name] - one[name]).abs().max().item() for name in one) < 1e-4


def test_an_image_that_vanishes_under_two_processes_is_told_once(tmp_path):
    """Gone after a third of the steps; with this seed both processes draw the third image in each of the others."""
    table = small_table(tmp_path)
    gone = sorted((tmp_path / "images").rglob("*.jpg"))[2]
    flags = ["--split=all", "--on_bad_image=skip", "--latent_cache_dir=none", "--train_batch_size=1", "--logging_steps=20", "--checkpointing_steps=20"]
    (process,) = start("bitfit", tmp_path / "run", *flags, processes=2, csv=table, steps=60)
    wait_for(tmp_path / "run" / "checkpoint-20", process)
    gone.unlink()
    said = output_of(process)
    assert process.returncode == 0 and said.count(str(gone)) == said.count(f"skipped  {gone}: cannot be read any more") == 1, said
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 60 and summary["images"] == 12 and summary["left_out"]["unreadable later, replaced by the next"] == 1


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    jumps = random.Random(0)
    train("bitfit", tmp_path / "steady", "--checkpointing_steps=2", steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: jumps.choice([0.0, 4e9, 1.7e9]))
        train("bitfit", tmp_path / "jumping", "--checkpointing_steps=2", f"--latent_cache_dir={tmp_path / 'other_cache'}", steps=2)
        os.utime(tmp_path / "jumping" / "checkpoint-2", (0, 0))
        train("bitfit", tmp_path / "jumping", "--checkpointing_steps=2", "--resume_from_checkpoint=latest", f"--latent_cache_dir={tmp_path / 'other_cache'}", steps=4)
    assert equal(trained_weights("bitfit", tmp_path / "steady"), trained_weights("bitfit", tmp_path / "jumping"))


def test_tokens_reach_no_file_and_no_output(tmp_path, capfd, monkeypatch):
    secret = "hf_" + "notarealtoken" * 2
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    train("lora", tmp_path / "run", "--checkpointing_steps=1", "--report_to=tensorboard", "--save_merged")
    said = capfd.readouterr()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in said.out + said.err


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    shutil.copytree(ROOT / "launch/demo/base", tmp_path / "base")
    change_weights(tmp_path / "base" / "vae", lambda tensors: tensors["decoder.conv_out.bias"].fill_(float("nan")))
    sentence = refused("lora", tmp_path / "run", f"--pretrained_model_name_or_path={tmp_path / 'base'}", capsys=capsys)
    assert "vae has weights that are not finite in 1 tensors, such as decoder.conv_out.bias" in sentence


# With these seeds the single rounds are SIGKILL to one of the two, SIGTERM and SIGKILL, in the middle of the work.
@pytest.mark.parametrize(("job", "processes", "rounds", "seed"), [("train_peft", 1, 3, 0), ("train_peft", 2, 1, 16), ("sample", 1, 1, 18), ("eval_generation", 1, 1, 9)])
def test_the_harness_in_short(job, processes, rounds, seed):
    """A few rounds of the long form, which ends with status 1 if anything is lost, doubled or damaged."""
    command = [sys.executable, ROOT / "tests/faults/run.py", "--rounds", rounds, "--kills", rounds, "--jobs", job, "--processes", processes, "--seed", seed]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0 and " 0 failures" in done.stdout, done.stdout + done.stderr
