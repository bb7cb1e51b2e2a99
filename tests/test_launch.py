"""Every command line in README.md, the docstrings and launch/ parses with the script that it starts.

The shell text is run by bash in a copy of launch/ where recorders replace the launchers, so loops, arrays and defaults
have their real values and nothing is trained.
"""

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
from common import ROOT

LAUNCH = ROOT / "launch"
TABLES = ["CheXpert-v1.0/train.csv", "train.csv", "val.csv", "test.csv"]
TABLES += [f"{study}/phantoms/CheXpert-phantom/train.csv" for study in ("demo", "demo/long")]
RECORDER = """#!/bin/bash
printf '%s\\0' "${{0##*/}}" "$@" > {record}.$EPOCHREALTIME.$$
"""
# SLURM's commands start at once what they would start on the cluster.
SLURM = {
    "srun": '#!/bin/bash\nexec "$@"\n',
    "sbatch": """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --array) export SLURM_ARRAY_TASK_ID=0; shift 2 ;; --parsable) shift ;; *) shift 2 ;; esac
done
bash "$@" >&2
echo 1
""",
}


def indented_lines(text, prefix="    "):
    return "\n".join(line.removeprefix(prefix).strip() for line in text.splitlines() if line.startswith(prefix))


def bash_blocks(markdown):
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE))


def find_sources():
    """Return shell text by file; scripts are run as a whole, and the commands in their comments too."""
    sources = {"README.md": bash_blocks((ROOT / "README.md").read_text())}
    sources["launch/demo/README.md"] = indented_lines((LAUNCH / "demo" / "README.md").read_text())
    for path in sorted([*ROOT.glob("*.py"), *LAUNCH.rglob("*.py"), *LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.yaml")]):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if path.suffix == ".py":
            sources[name] = indented_lines(ast.get_docstring(ast.parse(text), clean=False) or "")
        else:
            sources[f"{name} (comments)"] = indented_lines(text, "#   ")
        if path.suffix == ".sh":
            sources[name] = text
    return {name: text for name, text in sources.items() if text.strip()}


SOURCES = find_sources()


def command_lines(shell, folder, name="commands.sh"):
    """Run a shell text and return the calls of launchers that start a Python script, each once, as lists of words."""
    stubs, tree = folder / "stubs", folder / "tree"
    stubs.mkdir()
    recorder = RECORDER.format(record=folder / "record")
    for program, text in (SLURM | dict.fromkeys(("python", "accelerate"), recorder)).items():
        (stubs / program).write_text(text)
        (stubs / program).chmod(0o755)
    shutil.copytree(LAUNCH, tree / "launch", ignore=shutil.ignore_patterns("base", "__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tree)
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, tree)
    for table in TABLES:
        (tree / table).parent.mkdir(parents=True, exist_ok=True)
        (tree / table).write_text(",".join(["Path", *load("sample.py").CONDITIONS]))
    (tree / "xrays").mkdir()
    (tree / name).write_text(shell)
    # VIRTUAL_ENV: otherwise the scripts would make an environment.
    environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(folder), "VIRTUAL_ENV": str(stubs)}
    done = subprocess.run(["bash", name], cwd=tree, env=environment, capture_output=True, text=True, timeout=60)
    assert "error: " not in done.stderr and (done.returncode == 0 or name == "commands.sh"), done.stderr
    calls = [tuple(path.read_text().split("\0")[:-1]) for path in sorted(folder.glob("record.*"))]
    return [list(call) for call in dict.fromkeys(calls) if any(word.endswith(".py") for word in call)]


def split_launcher(line):
    """Return the script that a command line starts, and its arguments."""
    name, *words = line
    if name == "python":
        return words[0], words[1:]
    from accelerate.commands.launch import launch_command_parser

    assert words.pop(0) == "launch"
    args = launch_command_parser().parse_args(words)
    assert args.config_file is None or (ROOT / args.config_file).is_file(), f"no {args.config_file}"
    return args.training_script, args.training_script_args


def load(script):
    """Import a script, with its folder on the path as when it is started."""
    path = ROOT / script
    if path.stem not in sys.modules:
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
        sys.path.remove(str(path.parent))
    return sys.modules[path.stem]


def check(line):
    """Fail unless the script accepts the arguments and every flag has its full name; files need not exist."""
    script, argv = split_launcher(line)
    module = load(script)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("isfile", "isdir", "exists"):
            patch.setattr(f"os.path.{name}", lambda path: True)
        patch.setattr(argparse.ArgumentParser, "exit", lambda self, status=0, message="": pytest.fail(message))
        args = module.parse_args(argv)
    names = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    assert names <= set(vars(args)), f"shortened flags: {names - set(vars(args))}"


@pytest.mark.parametrize("source", SOURCES)
def test_command_lines_parse(source, tmp_path):
    lines = command_lines(SOURCES[source], tmp_path, source if source.endswith(".sh") else "commands.sh")
    assert lines or source.startswith("launch/environment.sh")
    for line in lines:
        check(line)


def test_variables_before_the_sweep_reach_the_scripts(tmp_path):
    lines = [" ".join(line) for line in command_lines(SOURCES["launch/sweep.sh (comments)"], tmp_path)]
    small = [line for line in lines if "--output_dir study/small/runs/bitfit" in line]
    assert small and all("--resolution 256" in line and line.endswith("--max_train_steps 2000") for line in small)
    assert any(
        "--data_csv train.csv --validation_csv val.csv" in line and "--image_root xrays" in line for line in lines
    )
    assert any("--method lora" in line and "--train_batch_size 8" in line for line in lines)  # BUDGET=authors
    of_base = [line for line in lines if " sd15-fp16 " in line]
    assert all("--variant fp16" in line for line in of_base)
    assert all(any(f"{name}.py" in line for line in of_base) for name in ("train_peft", "sample", "eval_generation"))


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch train_peft.py --method bitfit --bogus 1",
        "accelerate launch train_peft.py --method bitfit --max_train_st 5",
        "accelerate launch --bogus 1 train_peft.py --method bitfit",
        "accelerate launch --config_file launch/accelerate/none.yaml train_peft.py --method bitfit",
    ],
)
def test_bad_commands_are_caught(command, tmp_path, capsys):
    with pytest.raises((SystemExit, AssertionError, pytest.fail.Exception)):
        for line in command_lines(command, tmp_path):
            check(line)
