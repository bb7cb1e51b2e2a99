"""README.md's commands for the five scripts, run one after the other as a reader would, on the tiny pipeline.

They run in a folder that holds phantoms as CheXpert and a hospital's table; what a command writes, later ones find. The base
model stands in for the download, a classifier's features for torchxrayvision's; flags for small sizes come after the README's.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from common import BASE, launch, phantoms
from test_launch import bash_blocks, command_lines, load, split_launcher, ROOT

SMALL = {
    "train": [
        "--pretrained_model_name_or_path", BASE, "--resolution=64", "--max_train_steps=1", "--train_batch_size=2", "--gradient_accumulation_steps=1",
        "--max_validation_samples=2", "--num_validation_images=0", "--logging_steps=1", "--report_to=none", "--max_train_samples=8",
    ],
    "sample": ["--num_inference_steps=2", "--resolution=64", "--batch_size=8"],
    "eval_generation": ["--features=downstream/real/classifier", "--num_subsamples=3"],
    "eval_downstream": ["--weights=none", "--resolution=32", "--source_resolution=64", "--num_seeds=1", "--num_train_epochs=1", "--train_batch_size=8", "--bootstrap_samples=20"],
}  # fmt: skip
WORDS = {"stable-diffusion-v1-5/stable-diffusion-v1-5": str(BASE), "samples/stable-diffusion-v1-5": "samples/base"}
# The results that a command of each script must leave.
RESULTS = {"train": "training_summary.json", "sample": "metadata.csv", "eval_generation": "generation_metrics.json", "eval_downstream": "downstream_metrics.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader of the README would start: CheXpert unpacked, and tables of a hospital."""
    folder = tmp_path_factory.mktemp("readme")
    source = phantoms(60).parent
    shutil.copytree(source, folder / "CheXpert-v1.0")
    shutil.copytree(source, folder / "hospital" / "images")
    # For the commands without --image_root.
    (folder / "hospital" / "train").symlink_to(folder / "hospital" / "images" / "train")
    frame = pd.read_csv(source / "train.csv", dtype=str, keep_default_na=False)
    frame.to_csv(folder / "hospital" / "table.csv", index=False)
    frame["Path"] = [str(source.parent / path) for path in frame["Path"]]
    for name in ("train.csv", "test.csv", "other_hospital.csv"):
        frame.to_csv(folder / name, index=False)
    return folder


def readme_commands(folder: Path) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each of the README's command lines for the five scripts, in its order."""
    found = []
    # The study's own scripts are run in small by tests/test_study.py.
    shell = re.sub(r"^.*launch/\S*\.sh.*$", "", bash_blocks((ROOT / "README.md").read_text()), flags=re.MULTILINE)
    for line in command_lines(shell, folder):
        script, argv = split_launcher(line)
        if "/" not in script:
            found.append((Path(script).stem, argv))
    return found


def in_order(commands: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Training, sampling, then the classifier that later commands name before these."""

    def rank(command) -> int:
        script, argv = command
        needs = "samples/" in " ".join(argv) and script.startswith("train")
        makes = script == "eval_downstream" and argv == ["--train_on", "real"]
        return (0 if script.startswith("train") else 1 if script == "sample" else 2 if makes else 3) if not needs else 4

    return sorted(commands, key=rank)


def interrupt_run(module, small: list) -> None:
    """Leaves runs/unet as a run of `--train_unet` that was stopped after its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    module.main(module.parse_args([str(word) for word in ["--train_unet", *small, "--overwrite_output_dir"]]))
    for path in Path("runs/unet").iterdir():
        if not path.name.startswith("checkpoint"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def commands(folder, tmp_path_factory) -> list[tuple[str, list[str]]]:
    """The README's commands, each of which has been run in `folder`."""
    commands = in_order(readme_commands(tmp_path_factory.mktemp("commands")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_commands(commands, folder)
    return commands


def run_commands(commands: list[tuple[str, list[str]]], folder: Path) -> None:
    """Runs each in its small form, and looks for what it leaves."""
    for script, argv in commands:
        module = load(f"{script}.py")
        argv = [WORDS.get(word, word.replace("checkpoint-500", "checkpoint-1")) for word in argv]
        # bitsandbytes' 8-bit optimizer takes a compiler for a CPU.
        argv = [word for word in argv if word != "--use_8bit_adam" or torch.cuda.is_available()]
        small = SMALL["train" if script.startswith("train") else script]
        if script.startswith("train"):
            small = [*small, "--checkpointing_steps=1"]
            if "--resume_from_checkpoint" in argv:
                interrupt_run(module, small)
                small = [*small, "--max_train_steps=2"]
            else:
                # A finished run is not trained over.
                small = [*small, "--overwrite_output_dir"]
        elif script == "sample":
            small = [*small, *([] if "--like_csv" in argv else ["--images_per_label=3"]), *(["--num_images=12"] if "--like_csv" in argv else [])]
            shutil.rmtree(folder / "samples" / Path(argv[argv.index("--model") + 1]).name, ignore_errors=True)
        elif "--features" in argv:
            argv = [word for word in argv if word not in ("--features", "xrv.safetensors")]
        AcceleratorState._reset_state(reset_partial_state=True)
        args = module.parse_args([str(word) for word in [*argv, *small]])
        before = {path: path.stat().st_mtime_ns for path in folder.rglob(RESULTS["train" if script.startswith("train") else script])}
        if "--fsdp" in argv:
            # Shares among several processes.
            done = launch(ROOT / f"{script}.py", *argv, *small, processes=2, cwd=folder)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            module.main(args)
        after = {path: path.stat().st_mtime_ns for path in folder.rglob(RESULTS["train" if script.startswith("train") else script])}
        assert after != before, f"{script} {' '.join(argv)} left no result"


def test_the_commands_of_the_readme_run(commands):
    assert {script for script, _ in commands} == {"train_full", "train_peft", "sample", "eval_generation", "eval_downstream"}
    assert len(commands) >= 30


def test_the_python_of_the_readme_runs(commands, folder, monkeypatch):
    """On what the commands have left; what each paragraph loads can be used."""
    monkeypatch.chdir(folder)
    pipelines = 0
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE):
        for name, stand_in in WORDS.items():
            block = block.replace(name, stand_in)
        names = {}
        for paragraph in block.split("\n\n"):
            exec(paragraph, names)
            if "pipe = " in paragraph:
                pipelines += 1
                (image,) = names["pipe"]("Chest X-ray of a subject with Edema", height=64, width=64, num_inference_steps=1).images
                assert image.size == (64, 64)
    assert pipelines == 4 and names["images"][0]["image"].size == (64, 64)


def test_two_processes_on_a_cpu_as_the_readme_says(tmp_path):
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "accelerate/cpu.yaml" in line]
    launcher, *words = shlex.split(line)
    assert launcher == "accelerate"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, *SMALL["train"], "--data_csv", phantoms(60), "--output_dir", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "training_summary.json").read_text())["num_processes"] == 2
