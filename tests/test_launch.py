"""Every command line that a reader can copy parses against the script that it calls.

The texts are README.md's bash blocks, launch/demo/README.md's indented lines, the shell scripts in launch/ and the commands in
their comments and in the accelerate configurations', and the docstrings of the scripts. Each is run by bash in a copy of the
folder where recorders stand in for the launchers, so loops, arrays and defaults have the values that they have when a person
runs it, and nothing is trained.
"""

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ("python", "python3", "accelerate", "torchrun")
# SLURM's commands, which run here at once what they would run on the cluster.
SLURM = {
    "srun": 'exec "$@"',
    "sbatch": """while [[ $1 == --* ]]; do
  case $1 in --wrap) exec sh -c "$2" ;; --array) export SLURM_ARRAY_TASK_ID=0; shift 2 ;; --parsable) shift ;; *) shift 2 ;; esac
done
bash "$@" >&2
echo 1""",
}
# What the shell scripts want to be there before they start anything.
TABLES = ("CheXpert-v1.0/train.csv", "demo/phantoms/CheXpert-phantom/train.csv", "train.csv", "val.csv", "test.csv")
# Shell scripts that start none of the scripts.
WITHOUT_COMMANDS = {"launch/environment.sh"}
# Writes its own name and arguments, NUL after each, to a file of its own, since some are started side by side.
RECORDER = """#!{bash}
printf '%s\\0' "${{0##*/}}" "$@" > {record}.$EPOCHREALTIME.$$
"""
# The bash of a text: a script of launch/ that it starts has the system's commands beside the recorders, and must end well.
NESTED = """#!{bash}
[ -f "$1" ] || exit 0
PATH="{stubs}:{system}" {bash} "$@" || echo "exit status $?: $*" >> {failed}
"""


# ----------------------------------------------------------------------------------------------------------------------
# Finding commands
# ----------------------------------------------------------------------------------------------------------------------


def bash_blocks(markdown: str) -> str:
    return "\n".join(re.findall(r"^```(?:bash|sh)\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE))


def docstring_commands(source: str) -> str:
    """A docstring's indented lines."""
    text = ast.get_docstring(ast.parse(source), clean=False) or ""
    return "\n".join(line.strip() for line in text.splitlines() if line.startswith("    "))


def comment_commands(source: str) -> str:
    """The indented comments of a configuration or a shell script."""
    return "\n".join(line[1:].strip() for line in source.splitlines() if line.startswith("#   "))


def sources() -> dict[str, str]:
    """Shell text by the name of the file that it is in."""
    found = {"README.md": bash_blocks((ROOT / "README.md").read_text())}
    launch = ROOT / "launch"
    for path in sorted([*ROOT.glob("*.py"), *launch.rglob("*.py"), *launch.rglob("*.sh"), *launch.rglob("*.yaml")]):
        text = {".py": docstring_commands, ".sh": str, ".yaml": comment_commands}[path.suffix](path.read_text())
        found[str(path.relative_to(ROOT))] = text
    found |= {f"comments of launch/{name}": comment_commands((launch / name).read_text()) for name in ("sweep.sh", "slurm/submit.sh")}
    demo = (launch / "demo" / "README.md").read_text().splitlines()
    return found | {"launch/demo/README.md": "\n".join(line for line in demo if line.startswith("    "))}


def run_recorded(shell: str, folder: Path, name: str = "") -> list[list[str]]:
    """Runs a shell text in an empty folder and returns the launchers' calls, name first.

    A script of the repository (`name`) runs with the system's own commands, in a copy of launch/; any other text has
    nothing but the recorders, until it starts such a script.
    """
    bash, record, failed, stubs = shutil.which("bash"), folder / "record", folder / "failed", folder / "stubs"
    stubs.mkdir()
    programs = {launcher: RECORDER.format(bash=bash, record=record) for launcher in LAUNCHERS}
    programs |= {command: f"#!{bash}\n{body}\n" for command, body in SLURM.items()}
    if not name:
        programs["bash"] = NESTED.format(bash=bash, stubs=stubs, system=os.environ["PATH"], failed=failed)
    for program, body in programs.items():
        (stubs / program).write_text(body)
        (stubs / program).chmod(0o755)
    tree = folder / "tree"
    shutil.copytree(ROOT / "launch", tree / "launch", ignore=shutil.ignore_patterns("base", "__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tree)
    for table in TABLES:
        (tree / table).parent.mkdir(parents=True, exist_ok=True)
        (tree / table).touch()
    script = tree / (name or "commands.sh")
    script.write_text(shell)
    path = f"{stubs}:{os.environ['PATH']}" if name else str(stubs)
    # An active environment, so that no other is made.
    environment = {"PATH": path, "HOME": str(folder), "VIRTUAL_ENV": str(stubs)}
    done = subprocess.run([bash, script], check=False, cwd=tree, env=environment, capture_output=True, text=True, timeout=60)
    assert not name or done.returncode == 0, f"{name}: exit status {done.returncode}: {done.stderr}"
    assert not failed.exists(), f"{failed.read_text()}{done.stderr}"
    return [path.read_text().split("\0")[:-1] for path in sorted(folder.glob("record.*"))]


def command_lines(shell: str, folder: Path, name: str = "") -> list[list[str]]:
    """The calls that start a Python script, each once."""
    calls = [call for call in run_recorded(shell, folder, name) if any(word.endswith(".py") for word in call)]
    return [list(call) for call in dict.fromkeys(map(tuple, calls))]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[list[str]]]:
    """The command lines of every source."""
    return {
        source: command_lines(shell, tmp_path_factory.mktemp("source"), source if source.endswith(".sh") and (ROOT / source).is_file() else "")
        for source, shell in sources().items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Checking them
# ----------------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Ends a script as soon as its arguments are parsed."""


def launcher_parser(name: str) -> argparse.ArgumentParser:
    if name == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        return launch_command_parser()
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def split_launcher(line: list[str]) -> tuple[str, list[str]]:
    """The script that a command line starts and its arguments; the launcher's own flags go through its own parser."""
    name, *words = line
    if name.startswith("python"):
        index = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[index], words[index + 1 :]
    if name == "accelerate":
        assert words.pop(0) == "launch"
    args = launcher_parser(name).parse_args(words)
    if getattr(args, "config_file", None):
        assert (ROOT / args.config_file).is_file(), f"no {args.config_file}"
    return args.training_script, args.training_script_args


def load(script: str):
    """A script as a module, with its folder on the path as when it is started."""
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if path.stem not in sys.modules:
        sys.path.insert(0, str(path.parent))
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[path.stem]


def parse(module, argv: list[str]) -> argparse.Namespace:
    if hasattr(module, "parse_args"):
        return module.parse_args(argv)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
        original = argparse.ArgumentParser.parse_args

        def stop(self, *args, **kwargs):
            raise Parsed(original(self, argv))

        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module.main()
    return parsed.value.args[0]


def check(line: list[str]) -> None:
    """Fails unless the script takes the arguments as they are, every flag by its full name."""
    script, argv = split_launcher(line)
    module = load(script)
    # Data and models need not be there, nor optional packages be installed.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_file", "is_dir", "exists"):
            patch.setattr(Path, name, lambda self: True)
        for name in ("isfile", "isdir", "exists"):
            patch.setattr(f"os.path.{name}", lambda path: True)
        if hasattr(module, "version"):
            patch.setattr(module, "version", lambda package: "0")
        args = parse(module, argv)
    names = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    assert names <= set(vars(args)), f"shortened flags: {sorted(names - set(vars(args)))}"


@pytest.mark.parametrize("source", sources())
def test_command_lines_parse(source, commands, capsys):
    problems = []
    for line in commands[source]:
        try:
            check(line)
        except SystemExit as end:
            problems.append(f"{' '.join(line)}: exit status {end.code}: {capsys.readouterr().err.strip()[-300:]}")
        except AssertionError as error:
            problems.append(f"{' '.join(line)}: {error}")
    assert problems == []


@pytest.mark.parametrize("source", sources())
def test_every_source_has_commands(source, commands):
    if source not in WITHOUT_COMMANDS and not (source.endswith(".py") and "/" in source):
        assert commands[source], f"no command found in {source}"


def test_the_sweeps_of_the_texts_have_their_variables(commands):
    """What stands before `bash launch/sweep.sh` reaches the scripts."""
    lines = {" ".join(line) for line in commands["README.md"]} & {" ".join(line) for line in commands["comments of launch/sweep.sh"]}
    assert any("--output_dir study/small/runs/bitfit" in line and "--resolution 256" in line and line.endswith("--max_train_steps 2000") for line in lines)
    assert any("--data_csv train.csv --validation_csv val.csv" in line and "--image_root /data/xrays" in line for line in lines)
    authors = [line for line in commands["comments of launch/sweep.sh"] if "lora" in line and line[line.index("--train_batch_size") + 1] == "8"]
    assert authors


def test_a_script_that_fails_when_a_text_starts_it_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="'nothing' is none of"):
        command_lines("METHODS=nothing bash launch/sweep.sh", tmp_path)


def test_readme_starts_every_script(commands):
    started = {split_launcher(line)[0] for line in commands["README.md"]}
    assert {path.name for path in ROOT.glob("*.py")} <= started


def test_shell_scripts_that_the_readme_names_are_there():
    named = re.findall(r"\b(?:bash|source|sbatch) ([\w/.-]+\.sh)", (ROOT / "README.md").read_text())
    assert {"launch/demo.sh", "tests/run.sh"} <= set(named)
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_flag_that_the_readme_mentions_exists():
    prose = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    known = {"--fix"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("launch/*.py")]:
        known |= set(re.findall(r"""["'](--\w+)["']""", path.read_text()))
    for name in ("accelerate", "torchrun"):
        known |= {option for action in launcher_parser(name)._actions for option in action.option_strings}
    mentioned = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<!\w)--\w+", code)}
    assert mentioned and sorted(mentioned - known) == []


# ----------------------------------------------------------------------------------------------------------------------
# The extractor itself
# ----------------------------------------------------------------------------------------------------------------------

SHELL = """
STEPS="${STEPS:-20}"   # a comment with python nothing.py in it
common=(--resolution 64
  --report_to none)
launch() { accelerate launch --num_processes 1 "$@"; }
for method in lora bitfit; do
  launch train_peft.py --method "$method" "${common[@]}" \\
    --max_train_steps "$STEPS" --output_dir "runs/$method-${TAG:-x}" "$@" > log.txt 2>&1
done
CUDA_VISIBLE_DEVICES=0 python sample.py --model runs/lora --labels "No Finding" Edema && ACCELERATE_USE_CPU=true torchrun a.py
python -m pip install nothing
nobody sample.py
"""


def test_extractor_finds_commands_with_their_values(tmp_path):
    common = ["--resolution", "64", "--report_to", "none", "--max_train_steps", "20", "--output_dir"]
    launch = ["accelerate", "launch", "--num_processes", "1", "train_peft.py", "--method"]
    assert command_lines(SHELL, tmp_path) == [
        [*launch, "lora", *common, "runs/lora-x"],
        [*launch, "bitfit", *common, "runs/bitfit-x"],
        ["python", "sample.py", "--model", "runs/lora", "--labels", "No Finding", "Edema"],
        ["torchrun", "a.py"],
    ]
    assert bash_blocks("text\n```bash\npython a.py\n```\n```python\nimport b\n```\n") == "python a.py\n"
    assert docstring_commands('"""One.\n\n    python a.py --b c   # why\n\nTwo, python b.py.\n"""') == "python a.py --b c   # why"
    assert comment_commands("# One:\n#\n#   python a.py\nkey: value\n") == "python a.py"


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch train_peft.py --method bitfit --bogus 1",
        "accelerate launch train_peft.py --method adapters",
        "accelerate launch train_peft.py",
        "accelerate launch --bogus 1 train_peft.py --method bitfit",
        "accelerate launch --config_file launch/accelerate/none.yaml train_peft.py --method bitfit",
        "accelerate launch train_peft.py --method bitfit --max_train_st 5",
        "torchrun --bogus 2 train_peft.py --method bitfit",
        "python train_none.py",
        'python sample.py --model runs/lora --labels "Measles"',
        "python train_full.py --resolution 512",
    ],
)
def test_bad_commands_are_caught(command, tmp_path, capsys):
    (line,) = command_lines(command, tmp_path)
    with pytest.raises((SystemExit, AssertionError)):
        check(line)
