"""Kills the scripts at random moments and checks that nothing is lost, doubled or damaged.

    python tests/faults/run.py --rounds 100
    python tests/faults/run.py --rounds 4 --jobs train_peft sample --processes 2 --seed 7

A job is a script, or launch/sweep.sh, on a small problem on the CPU, started by `accelerate launch` where it has several
processes. It is first run undisturbed. Then, once, its surroundings fail: images that vanish, before it starts and while it runs,
a folder that is read-only, a disk that fills up at a random point of the work. Each has to end it with a sentence, and with more
room it goes on to its end, while the clock and the times of its files jump.
Then it is started in a new folder and hit again and again, each a round: SIGKILL or
SIGTERM to all its processes, or SIGKILL to one of them, which has to end the others within a minute. The moment is random over
the job's whole duration, or, in half of the rounds, soon after a new file has appeared. After each round every file that has its
final name must be whole; then, in a third of them, the newest checkpoint loses its end or has a bit flipped where there is
another to go on from.
After --kills rounds the job runs to its end. What it leaves is each time compared with the undisturbed one's: the same files, no
more and no fewer, trained weights bit by bit, images and figures. Exit status 1 if anything is found.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import resource
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
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "launch" / "demo" / "base"
JOBS = ("train_full", "train_peft", "sample", "eval_generation", "eval_downstream", "sweep")
LABELS = ["Edema", "No Finding", "Pleural Effusion"]
# What may differ between two runs of the same job: times, memory, and where the results lie.
FREE = {"seconds", "seconds_per_epoch", "peak_memory_gib", "arguments", "versions", "notes", "resume_from_checkpoint"}
# An undisturbed run that needs longer than this hangs.
LIMIT = 900
# A sitecustomize.py for the scripts' own processes: a clock that is thirty years wrong now and then.
CLOCK = f"""
import random, sys, time
if any(word.endswith(tuple(name + ".py" for name in {JOBS})) for word in sys.orig_argv[1:4]):
    jumps, right = random.Random(0), time.time
    time.time = lambda: right() + jumps.choice((-1e9, 0, 1e9))
"""


class Job:
    """A command and how to judge what it leaves."""

    def __init__(self, name: str, processes: int, data: dict):
        self.name, self.processes, self.data = name, processes, data

    def __str__(self) -> str:
        return f"{self.name} on {self.processes}"

    def start(self, folder: Path, log: Path | None, room: int | None = None, **variables: str) -> subprocess.Popen:
        """Starts it, its output to the log or, without one, to a pipe; with `room` for the bytes of any file that it writes."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(self.processes)]
            launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
        if self.name == "sweep":
            small = {
                "STUDY": folder, "METHODS": "bitfit", "MODEL": BASE, "LAUNCH": " ".join(launcher), "PROCESSES": self.processes, "LABELS": ",".join(LABELS),
                "TRAIN_CSV": self.data["csv"], "RESOLUTION": 64, "BATCH": 1, "GLOBAL_BATCH": 2, "BITFIT_LR": "1e-3", "MIXED_PRECISION": "no",
                "SAMPLE_FLAGS": "--images_per_label 6 --num_inference_steps 3", "EVALUATION_FLAGS": f"--features {folder}/downstream/real/classifier --num_subsamples 3",
                "DOWNSTREAM_FLAGS": "--arch resnet18 --weights none --resolution 32 --num_train_epochs 3 --num_seeds 1 --train_batch_size 4 --bootstrap_samples 50",
            }  # fmt: skip
            environment |= {key: str(value) for key, value in small.items()}
            command = ["bash", ROOT / "launch" / "sweep.sh", "--max_train_steps", "12", "--checkpointing_steps", "3", "--num_validation_images", "0"]
        else:
            command = [*launcher, ROOT / f"{self.name}.py", *self.flags(folder), "--output_dir", folder]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with log.open("a") if log else contextlib.nullcontext(subprocess.PIPE) as output:
            return subprocess.Popen(
                [str(word) for word in command], env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room or soft, hard)),
            )  # fmt: skip

    def flags(self, folder: Path) -> list:
        if self.name.startswith("train"):
            what = ["--train_unet", "--train_vae"] if self.name == "train_full" else ["--method", "difffit", "--use_ema"]
            return [
                *what, "--data_csv", self.data["csv"], "--pretrained_model_name_or_path", BASE, "--resolution", 64, "--train_batch_size", 1,
                "--gradient_accumulation_steps", 4 // self.processes, "--max_train_steps", 16, "--max_validation_samples", 4, "--num_validation_images", 0,
                "--checkpointing_steps", 3, "--logging_steps", 2, "--report_to", "none", "--resume_from_checkpoint", "latest",
                "--latent_cache_dir", folder.parent / "latent_cache",
            ]  # fmt: skip
        if self.name == "sample":
            return ["--model", BASE, "--labels", *LABELS, "--images_per_label", 16, "--num_inference_steps", 4, "--resolution", 64, "--batch_size", 2]
        if self.name == "eval_generation":
            return [
                "--synthetic", self.data["samples"], "--real_csv", self.data["csv"], "--train_csv", self.data["csv"], "--features", self.data["classifier"],
                "--vae", BASE, "--num_subsamples", 3, "--batch_size", 4, "--feature_cache_dir", folder.parent / "feature_cache",
            ]  # fmt: skip
        return [
            "--synthetic", self.data["samples"], "--real_csv", self.data["csv"], "--train_on", "both", "--arch", "resnet18", "--weights", "none",
            "--resolution", 32, "--num_train_epochs", 4, "--patience", 0, "--num_seeds", 2, "--train_batch_size", 4, "--bootstrap_samples", 50,
            "--image_cache_dir", folder.parent / "image_cache",
        ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it, the launcher's sessions included."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def ended(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.parent.rglob("*") if path.is_file()} if folder.parent.exists() else set()


def wait_for_the_moment(job: subprocess.Popen, folder: Path, duration: float, generator: random.Random) -> None:
    """Waits over a random part of the job's duration; half of the times from the first new file on, for a short while."""
    # Not quite to its end, since the machine may be faster than when the duration was taken.
    writing, share = generator.random() < 0.5, 0.9 * generator.random()
    before, began = files_of(folder), time.monotonic()
    while job.poll() is None and time.monotonic() - began < (2 * duration if writing else duration * share):
        if writing and files_of(folder) - before:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(0.3 * duration * share)
            return
        time.sleep(0.01)


def hit(job: subprocess.Popen, fault: str, processes: int, generator: random.Random) -> list[str]:
    """Does the fault to a running job; returns what went wrong with its end."""
    everything = tree(job.pid)
    if fault == "SIGKILL":
        # Stopped first, or the launcher would start or end others in between.
        signal_all(everything[:1], signal.SIGSTOP)
        signal_all(tree(job.pid)[::-1], signal.SIGKILL)
    elif fault == "SIGTERM":
        signal_all(everything[::-1], signal.SIGTERM)
    else:
        workers = [process for process in everything if is_worker(process)]
        signal_all(generator.sample(workers, 1) if workers else everything, signal.SIGKILL)
    began = time.monotonic()
    fine = ended(everything, 60)
    signal_all(tree(job.pid) + everything, signal.SIGKILL)
    job.wait()
    return [] if fine else [f"{fault}: processes were left after {time.monotonic() - began:.0f} s"]


def damage(folder: Path, generator: random.Random) -> Path | None:
    """Cuts or flips a bit in one file of the newest checkpoint, where there is an older one; returns the checkpoint."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if len(checkpoints) < 2 or generator.random() > 1 / 3:
        return None
    path = generator.choice(sorted(path for path in checkpoints[-1].iterdir() if path.stat().st_size))
    content = bytearray(path.read_bytes())
    if generator.random() < 0.5:
        del content[generator.randrange(len(content)) :]
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return checkpoints[-1]


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A folder on a file system of its own, in memory; gives False where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    fine = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0
    try:
        yield fine
    finally:
        if fine:
            subprocess.run(["umount", "--lazy", folder], check=True)


def ending(job: Job, process: subprocess.Popen, words: list[str]) -> list[str]:
    """What is wrong with how a job ended that could not go on: status 2 and one sentence, with one of the words in it."""
    try:
        said = process.communicate(timeout=LIMIT)[0].replace("\r", "\n")
    except subprocess.TimeoutExpired:
        signal_all(tree(process.pid), signal.SIGKILL)
        return ["hangs"]
    sentences = [line for line in said.splitlines() if ".py: error: " in line]
    # The launcher of several has a status and a traceback of its own, and each process its sentence.
    fine = process.returncode == 2 and len(sentences) == 1 and "Traceback" not in said if job.processes == 1 else process.returncode and sentences
    if not fine or not any(word in line for word in words for line in sentences):
        return [f"status {process.returncode}, {sentences or said[-2000:]}"]
    return []


def note(text: str) -> None:
    print(f"      {text}", flush=True)


def vanishing_images(job: Job, place: Path, duration: float, generator: random.Random) -> list[str]:
    """All images are moved away before a job starts, and while another runs; what went wrong."""
    images, gone, found = job.data["images"], job.data["images"].with_name("gone"), []
    for moment in (0, duration * generator.uniform(0.2, 0.8)):
        folder = place / f"vanishing-{moment:.1f}" / "out"
        if not moment:
            images.rename(gone)
        process = job.start(folder, None)
        if moment:
            time.sleep(moment)
            images.rename(gone)
        wrong = ending(job, process, ["view1_"])
        gone.rename(images)
        # What vanishes late may not be looked for any more.
        noticed = process.returncode != 0
        found += [f"images gone after {moment:.1f} s: {line}" for line in wrong if noticed or not moment] + damaged_files(folder)
        note(f"images gone after {moment:.1f} s: {'noticed' if noticed else 'not noticed'}")
    return found


def read_only_folder(job: Job, place: Path) -> list[str]:
    """A job is to write where it may not; what went wrong."""
    folder, found = place / "read-only" / "out", []
    with mounted(folder.parent, "ro") as fine:
        if not fine:
            folder.parent.chmod(0o500)
        # Root passes over permissions.
        possible = fine or os.geteuid() != 0
        if possible:
            found = [f"read-only folder: {line}" for line in ending(job, job.start(folder, None), ["cannot be written"])]
        note("read-only folder" if possible else "no read-only folder for root, who may not mount one here")
    folder.parent.chmod(0o700)
    return found


def full_disk(job: Job, whole: Path, place: Path, log: Path, generator: random.Random) -> list[str]:
    """A job's disk fills up; with room it goes on to its end, while the clock and the times of its files jump; what went wrong.

    The room is a part of what an undisturbed run leaves, or, where no disk may be mounted, of its largest file.
    """
    folder, share = place / "full" / "out", generator.uniform(0.1, 0.9)
    sizes = [path.stat().st_size for path in files_of(whole)]
    with mounted(folder.parent, f"size={int(share * sum(-(-size // 4096) for size in sizes)) * 4}k") as fine:
        process = job.start(folder, None, room=None if fine else int(share * max(sizes)))
        found = [f"full disk: {line}" for line in ending(job, process, ["make room", "cannot be written"])] + damaged_files(folder)
        note(f"{'disk' if fine else 'quota'} full at {share:.0%}, with {len(files_of(folder))} of {len(sizes)} files there")
        if fine:
            subprocess.run(["mount", "-o", "remount,size=50%", folder.parent], check=True)
        for path in files_of(folder):
            os.utime(path, (jump := generator.choice([0, 1e9, 4e9]), jump))
        run_whole(job, folder, log, PYTHONPATH=str(log.parent / "clock"))
        return found + differences(job, whole, folder)


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is one of the script's own, not a launcher or a shell."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        words = process.cmdline()
        return len(words) > 1 and any(word.endswith(f"{name}.py") for name in JOBS for word in words[1:3])
    return False


# ----------------------------------------------------------------------------------------------------------------------
# What must hold
# ----------------------------------------------------------------------------------------------------------------------


def damaged_files(folder: Path, known: list[str] = []) -> list[str]:
    """Files under their final names that are not whole; what is still being written is hidden or ends in .part.

    What is in the `known` folders was damaged by this harness.
    """
    sys.path.insert(0, str(ROOT))
    import train_full

    found = []
    for path in folder.parent.rglob("*"):
        if any(part.startswith(".") or part.endswith((".part", ".sizes")) for part in path.relative_to(folder.parent).parts):
            continue
        if known and any(str(part) in known for part in (path, path.parent)):
            continue
        try:
            if path.is_dir() and path.name.startswith("checkpoint-"):
                assert train_full.checkpoint_problem(path) is None, train_full.checkpoint_problem(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".npy":
                np.load(path, mmap_mode="r", allow_pickle=False)
            elif path.suffix in (".csv", ".md", ".html"):
                assert path.stat().st_size
        except FileNotFoundError:
            pass
        except Exception as error:  # of whatever reads that kind of file
            found.append(f"{path.relative_to(folder.parent)} is damaged: {type(error).__name__} {error}")
    return found


def names_of(folder: Path) -> list[str]:
    """What a finished job leaves, but for what is named by the time or the place of a run: its checkpoints, caches and logs."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path) for path in paths if not any(part.startswith("checkpoint-") or part.endswith("_cache") or part == "logs" for part in path.parts))


def same(one, two, path: str = "") -> list[str]:
    """Where two results differ, beyond the rounding that other batches bring."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.get("metric") in FREE or two.get("metric") in FREE:
            return []
        keys = [key for key in {**one, **two} if key not in FREE]
        return [line for key in keys for line in same(one.get(key), two.get(key), f"{path}/{key}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [line for i, pair in enumerate(zip(one, two)) for line in same(*pair, f"{path}/{i}")]
    if isinstance(one, float) and isinstance(two, (int, float)):
        return [] if abs(one - two) <= 1e-3 * max(abs(one), abs(two), 1e-2) else [f"{path}: {one} and {two}"]
    return [] if one == two else [f"{path}: {str(one)[:80]} and {str(two)[:80]}"]


def differences(job: Job, whole: Path, folder: Path) -> list[str]:
    """What a job that was hit has otherwise than one that was not."""
    found = []
    names, expected = names_of(folder), names_of(whole)
    if names != expected:
        found.append(f"files: lost {sorted(set(expected) - set(names))[:5]}, too many {sorted(set(names) - set(expected))[:5]}")
    for name in sorted(set(names) & set(expected)):
        one, two = whole / name, folder / name
        if name.endswith(".safetensors"):
            first, second = load_file(one), load_file(two)
            if first.keys() != second.keys() or not all(first[key].equal(second[key]) for key in first):
                found.append(f"{name}: the weights are not bit-identical")
        elif name.endswith(".png") and (job.name == "sample" or name.startswith("samples/")):
            pictures = [np.asarray(Image.open(path).convert("RGB"), int) for path in (one, two)]
            # Other batches round otherwise.
            if np.abs(pictures[0] - pictures[1]).max() > 2:
                found.append(f"{name}: another picture")
        elif name.endswith("metadata.csv"):
            rows = [list(csv.DictReader(path.open(newline=""))) for path in (one, two)]
            files = [row["file_name"] for row in rows[1]]
            if [row["file_name"] for row in rows[0]] != files or len(set(files)) < len(files):
                found.append(f"{name}: rows lost or doubled")
        elif name.endswith(("_metrics.json", "training_summary.json")):
            texts = (one.read_text().replace(str(whole), "OUT"), two.read_text().replace(str(folder), "OUT"))
            found += [f"{name}{line}" for line in same(*map(json.loads, texts))]
        elif name.endswith("report.csv"):
            rows = [[row for row in csv.DictReader(path.open(newline="")) if row["metric"] not in FREE] for path in (one, two)]
            count = [len(part) for part in rows]
            if count[0] != count[1] or [row["metric"] for row in rows[0]] != [row["metric"] for row in rows[1]]:
                found.append(f"{name}: {count[0]} rows and {count[1]}")
    kept = [path.name for path in folder.rglob("checkpoint-*")]
    if len(kept) > 2:
        found.append(f"{len(kept)} checkpoints are kept: {kept}")
    return found + damaged_files(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The work
# ----------------------------------------------------------------------------------------------------------------------


def run_whole(job: Job, folder: Path, log: Path, **variables: str) -> float:
    """Runs a job to its end; the seconds that it took."""
    began = time.monotonic()
    process = job.start(folder, log, **variables)
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        signal_all(tree(process.pid), signal.SIGKILL)
        raise RuntimeError(f"{job}: hangs; see {log}") from None
    if status:
        raise RuntimeError(f"{job}: exit status {status}: {log.read_text()[-2000:]}")
    return time.monotonic() - began


def prepare(folder: Path, jobs: list[str]) -> dict:
    """Phantoms and, for the evaluations, samples and a classifier, which the jobs start from."""
    commands = [
        [ROOT / "launch/demo/make_phantoms.py", "--output_dir", folder / "phantoms", "--num_patients", 60],
        [ROOT / "sample.py", "--model", BASE, "--labels", *LABELS, "--images_per_label", 12, "--num_inference_steps", 3, "--resolution", 64, "--output_dir", folder / "samples"],
        [
            ROOT / "eval_downstream.py", "--synthetic", folder / "samples", "--real_csv", folder / "phantoms/CheXpert-phantom/train.csv", "--train_on", "real", "--arch", "resnet18",
            "--weights", "none", "--resolution", 32, "--num_train_epochs", 2, "--num_seeds", 1, "--train_batch_size", 4, "--bootstrap_samples", 50, "--output_dir", folder / "real",
        ],
    ]  # fmt: skip
    for command in commands if {"eval_generation", "eval_downstream"} & set(jobs) else commands[:1]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, env=environment)
    phantoms = folder / "phantoms/CheXpert-phantom"
    return {"csv": phantoms / "train.csv", "images": phantoms / "train", "samples": folder / "samples", "classifier": folder / "real/classifier"}


def main(args: argparse.Namespace) -> int:
    generator, faults, failures, moments = random.Random(args.seed), Counter(), [], []
    # Of its own, so that the moments of the kills stay those of the seed.
    damages, damaged, faults_of_files = random.Random(args.seed), [], Counter()
    root = Path(args.keep or tempfile.mkdtemp(prefix="faults-"))
    root.mkdir(parents=True, exist_ok=True)
    log = root / "log"
    log.touch()
    (root / "clock").mkdir(exist_ok=True)
    (root / "clock" / "sitecustomize.py").write_text(CLOCK)
    jobs = [Job(name, processes, {}) for processes in args.processes for name in args.jobs]
    data, durations, finished, number = prepare(root / "data", args.jobs), {}, 0, 0
    print(f"seed {args.seed}, {args.rounds} rounds of {', '.join(map(str, jobs))}, in {root}", flush=True)
    while sum(faults.values()) < args.rounds:
        job = jobs[number % len(jobs)]
        job.data, place = data, root / str(job).replace(" ", "-")
        whole, folder = place / "whole" / "out", place / f"hit-{number}" / "out"
        number += 1
        hits, known = 0, len(failures)
        try:
            if job not in durations:
                durations[job] = run_whole(job, whole, log)
                note(f"{job}: {durations[job]:.0f} s undisturbed")
                # Each job's own, whatever others are asked for.
                own = random.Random(f"{args.seed} {job}")
                found = vanishing_images(job, place, durations[job], own) if job.name != "sample" else []
                found += read_only_folder(job, place) + full_disk(job, whole, place, log, own)
                failures += [f"{job}, {line}" for line in found]
            ran_out = False
            # The sweep has all the other jobs in it, and takes as long as they do together.
            while hits < (2 if job.name == "sweep" else args.kills) and sum(faults.values()) < args.rounds and not ran_out:
                process, began = job.start(folder, log), time.monotonic()
                wait_for_the_moment(process, folder, durations[job], generator)
                ran_out = process.poll() is not None
                if ran_out:
                    # It came to its end before its turn; the rest of its rounds go to others.
                    if process.returncode:
                        raise RuntimeError(f"{job}: exit status {process.returncode} without a fault: {log.read_text()[-2000:]}")
                    break
                fault = generator.choice(["SIGKILL", "SIGKILL", "SIGTERM", "one process"])
                moments.append(round(time.monotonic() - began, 1))
                found = hit(process, fault, job.processes, generator) + damaged_files(folder, damaged)
                failures += [f"{job}, {fault} after {moments[-1]} s: {line}" for line in found]
                faults[f"{job}, {fault}"] += 1
                hits += 1
                if job.name.startswith("train") and not found and (checkpoint := damage(folder, damages)):
                    damaged.append(str(checkpoint))
                    faults_of_files[job.name] += 1
            if not ran_out:
                run_whole(job, folder, log)
            failures += [f"{job}, in the end: {line}" for line in differences(job, whole, folder)]
            finished += 1
        except RuntimeError as error:
            failures.append(str(error))
        print(f"{sum(faults.values()):>5} rounds, {job}: {hits} hits, {len(failures)} failures so far", flush=True)
        for line in failures[known:]:
            note(line)
        if len(failures) > 20 or number > 20 * args.rounds:
            break
        if not failures and not args.keep:
            shutil.rmtree(folder.parent)
    for name, count in sorted(faults.items()):
        print(f"{count:>5}  {name}")
    for name, count in sorted(faults_of_files.items()):
        print(f"{count:>5}  {name}, newest checkpoint damaged")
    if sum(faults.values()) < args.rounds:
        failures.append(f"only {sum(faults.values())} of {args.rounds} rounds: the jobs end before they are hit")
    print(f"{sum(faults.values())} rounds with seed {args.seed}, {finished} jobs brought to their end, {len(failures)} failures")
    print("\n".join(failures))
    if not failures and not args.keep:
        shutil.rmtree(root)
    return bool(failures)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="faults in all")
    parser.add_argument("--kills", type=int, default=8, help="faults to one run before it may come to its end; two to the sweep")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="what is hit")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their moments; the machine's speed has its part in these")
    parser.add_argument("--keep", help="folder that everything is left in (default: a temporary one, left only after failures)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
