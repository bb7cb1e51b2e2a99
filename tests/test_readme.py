"""README.md's commands for the five scripts and its Python run, on phantoms and the tiny base model."""

import re
import shutil

import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from common import BASE, ROOT, phantoms
from test_launch import bash_blocks, command_lines, load, split_launcher

README = (ROOT / "README.md").read_text()
# What makes the commands small, and the file that each must write.
TRAINING = f"""--pretrained_model_name_or_path={BASE} --resolution=64 --max_train_steps=1
    --train_batch_size=2 --max_train_samples=8 --gradient_accumulation_steps=1 --max_validation_samples=2
    --num_validation_images=0 --report_to=none
    --checkpointing_steps=0 --overwrite_output_dir"""
SMALL = {
    "train_full": (TRAINING, "training_summary.json"),
    "train_peft": (TRAINING, "training_summary.json"),
    "sample": ("--num_inference_steps=2 --resolution=64 --batch_size=8", "metadata.csv"),
    "eval_generation": ("--features=downstream/real/classifier --num_subsamples=3", "generation_metrics.json"),
    "eval_downstream": (
        "--weights=none --resolution=32 --source_resolution=64 --num_seeds=1 --num_train_epochs=1 "
        "--train_batch_size=8 --bootstrap_samples=20",
        "downstream_metrics.json",
    ),
}
STAND_INS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(BASE),
    "samples/stable-diffusion-v1-5": "samples/base",
    "xrv.safetensors": "downstream/real/classifier",
    "runs/unet/checkpoint-500": "runs/lora",  # no checkpoints are written
}


def readme_commands(folder):
    """Return (script, arguments) of the README's commands, those that need another's output after it."""
    shell = re.sub(r"^.*launch/\S*\.sh.*$", "", bash_blocks(README), flags=re.MULTILINE)  # see test_study.py
    found = [split_launcher(line) for line in command_lines(shell, folder)]
    commands = [(script.removesuffix(".py"), argv) for script, argv in found if "/" not in script]

    def rank(command):
        script, argv = command
        if script.startswith("train"):
            return 2 if any("samples/" in word for word in argv) else 0
        return 1 if script == "sample" else 3 if "--train_on" in argv else 4

    return sorted(commands, key=rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader would start, with CheXpert and a hospital's table; all commands have been run there."""
    folder, source, runs = tmp_path_factory.mktemp("readme"), phantoms(60).parent, []
    shutil.copytree(source, folder / "CheXpert-v1.0")
    shutil.copytree(source, folder / "hospital" / "images")
    pd.read_csv(source / "train.csv", dtype=str, keep_default_na=False).to_csv(
        folder / "hospital/table.csv", index=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script, argv in readme_commands(tmp_path_factory.mktemp("commands")):
            small, result = SMALL[script]
            # bitsandbytes' optimizer needs a GPU, or a compiler.
            argv = [STAND_INS.get(word, word) for word in argv if word != "--use_8bit_adam"]
            if script == "sample":
                small += " --num_images=12" if "--like_csv" in argv else " --images_per_label=3"
            module = load(f"{script}.py")
            args = module.parse_args([*argv, *small.split()])
            # Trainings that differ by their settings only are run once; test_launch.py parses all.
            run = (args.output_dir, args.data_csv, args.dataset_name) if script.startswith("train") else tuple(argv)
            if run not in runs:
                runs.append(run)
                shutil.rmtree(folder / args.output_dir, ignore_errors=True)
                AcceleratorState._reset_state(reset_partial_state=True)
                module.main(args)
                assert (folder / args.output_dir / result).is_file(), (script, argv)
    return folder


def test_every_script_is_run(folder):
    """The commands run in the fixture; here, what they have left."""
    assert all(list(folder.rglob(result)) for _, result in SMALL.values())
    assert {path.name for path in (folder / "runs").iterdir()} >= {"bitfit", "lora", "unet", "latent_cache"}


def test_the_python_runs(folder, monkeypatch):
    """On what the commands have left; each paragraph loads a pipeline that can be used."""
    monkeypatch.chdir(folder)
    if not (folder / "runs/difffit").exists():
        module = load("train_peft.py")
        AcceleratorState._reset_state(reset_partial_state=True)
        module.main(module.parse_args(["--method=difffit", "--save_merged", *TRAINING.split()]))
    pipelines = 0
    for block in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        for name, stand_in in STAND_INS.items():
            block = block.replace(name, stand_in)
        names = {}
        for paragraph in block.split("\n\n"):
            exec(paragraph, names)
            if "pipe = " in paragraph:
                pipelines += 1
                (image,) = names["pipe"]("Edema", height=64, width=64, num_inference_steps=1).images
                assert image.size == (64, 64)
    assert pipelines == 4


def test_files_and_flags_that_the_text_mentions_exist():
    named = re.findall(r"\]\((?!http|#)([^)#]+)\)|\b((?:launch|tests)/[\w/.-]+\.(?:sh|py|yaml))\b", README)
    assert named and not [path for pair in named for path in pair if path and not (ROOT / path).exists()]
    known = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("launch/*.py")]:
        known |= set(re.findall(r'"(--\w+)"', path.read_text()))
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    mentioned = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<!\w)--\w+", code)}
    assert mentioned and not mentioned - known - {"--help", "--num_processes"}  # the last is accelerate's
