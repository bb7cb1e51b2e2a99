"""Kill the scripts at random moments, start them again, and check that nothing is lost, doubled or damaged.

    python tests/faults/run.py --rounds 100
    python tests/faults/run.py --rounds 4 --jobs train_peft sample --processes 2 --seed 7

A job is a script on a small problem on the CPU, started by `accelerate launch` if it has several processes. It runs
once undisturbed. Then it is started in a new folder and hit several times, each a round: SIGKILL or SIGTERM to all its
processes, or SIGKILL to one of them, which must end the others within a minute. The moment is random, in most rounds
soon after a new file has appeared. After each round, every file under its final name must be whole. After --kills
rounds the job runs to its end and is compared with the undisturbed run: the same files, weights bit by bit, images and
figures. Exits with status 1 if anything differs.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "launch" / "demo" / "base"
JOBS = ["train_full", "train_peft", "sample", "eval_generation", "eval_downstream"]
CLASSIFIER = "--arch resnet18 --weights none --resolution 32 --train_batch_size 4 --bootstrap_samples 50"
# What may differ between two runs of the same job.
FREE = "seconds seconds_per_epoch peak_memory_gib arguments notes".split()
# Seconds after which a job hangs: undisturbed, and after a fault.
RUN_LIMIT, END_LIMIT = 900, 60
EXIT_PREEMPTED = 75  # as in train_full.py


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


def start(command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, cwd=ROOT, **options)


def prepare(folder, jobs):
    """Make what the jobs start from: phantoms and, for the evaluations, samples and a classifier."""
    size = "--images_per_label 24 --num_inference_steps 3 --resolution 64"
    training = f"--train_on real {CLASSIFIER} --num_train_epochs 2 --num_seeds 1"
    commands = [
        f"launch/demo/make_phantoms.py --num_patients 60 --output_dir {folder}/phantoms",
        f"sample.py --model {BASE} {size} --labels Edema Pneumothorax --output_dir {folder}/samples",
        f"eval_downstream.py {tables(folder)} {training} --output_dir {folder}/real",
    ]
    for command in commands if any(name.startswith("eval") for name in jobs) else commands[:1]:
        if start(command.split(), stdout=subprocess.DEVNULL).wait():
            raise RuntimeError(f"{command} failed")


def tables(data):
    return f"--synthetic {data}/samples --real_csv {data}/phantoms/CheXpert-phantom/train.csv"


class Job:
    """A script on a number of processes, with a folder for its runs and its log."""

    def __init__(self, name, processes, root):
        self.name, self.processes, self.place = name, processes, root / f"{name}-{processes}"
        self.place.mkdir()
        self.data, self.log, self.duration = root / "data", self.place / "log", None

    def __str__(self):
        return f"{self.name} on {self.processes}"

    def flags(self, caches):
        csv = f"{self.data}/phantoms/CheXpert-phantom/train.csv"
        training = (
            f"--data_csv {csv} --pretrained_model_name_or_path {BASE} --latent_cache_dir {caches}/latents "
            f"--resolution 64 --train_batch_size 1 --gradient_accumulation_steps {4 // self.processes} "
            "--max_train_steps 16 --use_ema --max_validation_samples 4 --num_validation_images 0 "
            "--checkpointing_steps 3 --logging_steps 2 "
            "--report_to none --resume_from_checkpoint latest"
        )
        networks = f"--features {self.data}/real/classifier --vae {BASE} --feature_cache_dir {caches}/features"
        return {
            "train_full": f"--train_unet --train_vae {training}",
            "train_peft": f"--method difffit {training}",
            "sample": f"--model {BASE} --images_per_label 8 --num_inference_steps 4 --resolution 64 --batch_size 2",
            "eval_generation": f"{tables(self.data)} --train_csv {csv} {networks} --num_subsamples 3 --batch_size 4",
            "eval_downstream": f"{tables(self.data)} --train_on both {CLASSIFIER} --num_train_epochs 4 --patience 0 "
            f"--num_seeds 2 --image_cache_dir {caches}/images",
        }[self.name].split()

    def start(self, folder):
        launcher = (
            "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_machines 1 --mixed_precision no".split()
        )
        launcher += f"--dynamo_backend no --main_process_port 0 --num_processes {self.processes}".split()
        command = [f"{self.name}.py", *self.flags(folder.parent), "--output_dir", folder]
        folder.parent.mkdir(exist_ok=True)
        with self.log.open("a") as log:
            return start((launcher if self.processes > 1 else []) + command, stdout=log, start_new_session=True)

    def run_to_the_end(self, folder):
        """Return the seconds that an undisturbed run takes."""
        began, process = time.monotonic(), self.start(folder)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(RUN_LIMIT)
        if process.returncode != 0:
            send(signal.SIGKILL, process_tree(process.pid))
            raise RuntimeError(f"{self}: status {process.returncode}: {self.log.read_text()[-2000:]}")
        return time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def process_tree(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def send(number, processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_worker(process):
    """Return whether a process runs one of the scripts itself, and is not its launcher."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return any(Path(word).stem in JOBS for word in process.cmdline()[1:3])
    return False


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def wait_for_the_moment(process, folder, duration, rng):
    """Wait for a random part of the job's duration or, in most rounds, shortly after the first new file."""
    # Short of the whole duration, since the machine may be faster now than it was then.
    after_a_file, share = rng.random() < 0.7, 0.9 * rng.random()
    before, began = files_in(folder.parent), time.monotonic()
    while process.poll() is None and time.monotonic() - began < duration * (2 if after_a_file else share):
        if after_a_file and files_in(folder.parent) - before:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3 * duration * share)
            return
        time.sleep(0.01)


def hit(process, fault, rng):
    """Apply a fault to a running job. Returns its exit status, None if it does not end by itself."""
    processes = process_tree(process.pid)
    if fault == "SIGKILL":
        send(signal.SIGSTOP, processes[:1])  # or the launcher would react in between
        send(signal.SIGKILL, process_tree(process.pid)[::-1])
    elif fault == "SIGTERM":
        send(signal.SIGTERM, processes[::-1])
    else:
        workers = [process for process in processes if is_worker(process)]
        send(signal.SIGKILL, rng.sample(workers, 1) if workers else processes)
    left = psutil.wait_procs(processes, timeout=END_LIMIT)[1]
    send(signal.SIGKILL, processes + process_tree(process.pid))
    status = process.wait()
    return None if left else status


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def broken_files(folder):
    """Return files under their final names that are not whole; unfinished ones are hidden or end in .tmp."""
    problems, checkpoint = [], {"state.json", "trainable.safetensors", "optimizer.safetensors", "ema.safetensors"}
    for path in folder.rglob("*"):
        if any(part.startswith(".") or part.endswith(".tmp") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.name.startswith("checkpoint-"):
                assert checkpoint == {file.name for file in path.iterdir()}, "files are missing"
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".npy":
                np.load(path, mmap_mode="r")
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix in (".csv", ".md"):
                assert path.read_text().endswith("\n"), "its end is missing"
        except Exception as error:  # broken files can raise anything
            problems.append(f"{path.relative_to(folder)} is broken: {type(error).__name__} {error}")
    return problems


def json_differences(one, two, path=""):
    """Return where two results differ by more than the rounding errors of other batches."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.get("metric") in FREE:
            return []
        keys = [key for key in {**one, **two} if key not in FREE]
        return [line for key in keys for line in json_differences(one.get(key), two.get(key), f"{path}/{key}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [line for i, pair in enumerate(zip(one, two)) for line in json_differences(*pair, f"{path}/{i}")]
    if isinstance(one, float) and isinstance(two, float):
        return [] if abs(one - two) <= 1e-3 * max(abs(one), abs(two), 1e-2) else [f"{path}: {one}, {two}"]
    return [] if one == two else [f"{path}: {str(one)[:80]}, {str(two)[:80]}"]


def file_differences(name, whole, folder):
    one, two, same = whole / name, folder / name, True
    if name.endswith(".safetensors"):
        first, second = load_file(one), load_file(two)
        tolerance = {"rtol": 1e-3, "atol": 1e-5, "equal_nan": True} if "draws" in name else {"rtol": 0, "atol": 0}
        same = first.keys() == second.keys() and all(np.allclose(first[k], second[k], **tolerance) for k in first)
    elif name.endswith(".png") and (folder / "metadata.csv").is_file():  # a sample, no plot
        first, second = (np.asarray(Image.open(path).convert("RGB"), int) for path in (one, two))
        same = np.abs(first - second).max() <= 2
    elif name.endswith(".csv"):
        same = one.read_text() == two.read_text()
    elif name.endswith(".json"):
        texts = one.read_text().replace(str(whole.parent), "OUT"), two.read_text().replace(str(folder.parent), "OUT")
        return [f"{name}{line}" for line in json_differences(*map(json.loads, texts))]
    return [] if same else [f"{name}: other content"]


def differences(whole, folder):
    """Return how the files of a job that was hit differ from those of one that was not, checkpoints left out."""
    # safetensors writes to .tmp… first, which a kill leaves behind.
    listed = (
        {str(path.relative_to(run)) for path in files_in(run) if path.name[:4] != ".tmp"} for run in (whole, folder)
    )
    expected, found = ({name for name in names if "checkpoint-" not in name} for names in listed)
    problems = [f"{name}: lost" for name in expected - found] + [f"{name}: too many" for name in found - expected]
    problems += [line for name in sorted(expected & found) for line in file_differences(name, whole, folder)]
    kept = [path.name for path in folder.glob("checkpoint-*")]
    return problems + ([f"{len(kept)} checkpoints are kept: {kept}"] if len(kept) > 2 else [])


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def hit_and_compare(job, folder, kills, rng):
    """Hit a job `kills` times, let it end, and compare it with an undisturbed run. Returns faults and problems."""
    whole, faults, problems = job.place / "whole" / "out", Counter(), []
    job.duration = job.duration or job.run_to_the_end(whole)
    for _ in range(kills):
        checkpoints, process, began = set(folder.glob("checkpoint-*")), job.start(folder), time.monotonic()
        wait_for_the_moment(process, folder, job.duration, rng)
        if process.poll() is not None:
            if process.returncode:
                raise RuntimeError(f"{job}: status {process.returncode}: {job.log.read_text()[-2000:]}")
            break  # faster than expected; other jobs take over its rounds
        fault = rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGKILL to one"])
        moment = f"{fault} after {time.monotonic() - began:.1f} of {job.duration:.0f} s"
        training = bool(set(folder.glob("checkpoint-*")) - checkpoints)  # it answers SIGTERM from its first step on
        status, found = hit(process, fault, rng), broken_files(folder.parent)
        if status is None:
            found.append(f"processes are left after {END_LIMIT} s")
        # 0: after the last step. `accelerate launch` turns 75 into 1.
        elif training and fault == "SIGTERM" and job.processes == 1 and status not in (EXIT_PREEMPTED, 0):
            found.append(f"exit status {status} instead of {EXIT_PREEMPTED}")
        problems += [f"{job}, {moment}: {line}" for line in found]
        faults[f"{job}, {fault}"] += 1
    job.run_to_the_end(folder)
    return faults, problems + [f"{job}, in the end: {line}" for line in differences(whole, folder)]


def main(args):
    rng, faults, failures = random.Random(args.seed), Counter(), []
    root = Path(args.keep or tempfile.mkdtemp(prefix="faults-")).resolve()
    prepare(root / "data", args.jobs)
    jobs = [Job(name, processes, root) for processes in args.processes for name in args.jobs]
    print(f"seed {args.seed}, {args.rounds} rounds of {', '.join(map(str, jobs))}, in {root}", flush=True)
    for number, job in enumerate(itertools.cycle(jobs)):
        left = args.rounds - faults.total()
        if left <= 0 or len(failures) > 20 or number > 5 * args.rounds:
            break
        folder, found = job.place / f"hit-{number}" / "out", []
        try:
            counts, found = hit_and_compare(job, folder, min(left, args.kills), rng)
            faults += counts
        except RuntimeError as error:
            found = [str(error)]
        failures += found
        print(
            f"{faults.total():>5} rounds, {job}, {len(failures)} failures so far", *found, sep="\n      ", flush=True
        )
        if not found and not args.keep:
            shutil.rmtree(folder.parent)
    for name, count in sorted(faults.items()):
        print(f"{count:>5}  {name}")
    if not failures and faults.total() < args.rounds:
        failures = ["too few rounds: the jobs end before they are hit"]
    print(f"{faults.total()} rounds with seed {args.seed}, {len(failures)} failures")
    if not failures and not args.keep:
        shutil.rmtree(root)
    return bool(failures)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="number of faults")
    parser.add_argument("--kills", type=int, default=8, help="faults to one run before it may end")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of faults and moments")
    parser.add_argument("--keep", help="empty folder that keeps all files (default: a temporary one, kept on failure)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
