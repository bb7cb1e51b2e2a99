"""Each script stands alone: copied into an empty folder it still runs, and it says itself what it needs."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:
    # Python 3.10, where pytest brings it.
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PACKAGE_OF = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn", "vendi_score": "vendi-score"}
# Needed without an import of their own: peft by diffusers for adapters, tensorboard by accelerate for the default logs,
# torchvision by transformers, bitsandbytes by a flag.
INDIRECT = {"peft", "tensorboard", "torchvision", "bitsandbytes"}


def metadata(script: str) -> dict:
    """The PEP 723 block at the top of a script."""
    text = (ROOT / f"{script}.py").read_text()
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", text)
    assert block, f"{script}.py does not begin with a PEP 723 block"
    return tomllib.loads("\n".join(line[2:] for line in block[1].splitlines()))


def requirements(lines: list[str]) -> dict[str, str]:
    """{"torch": ">=2.6"} from ["torch>=2.6"]."""
    parsed = [re.match(r"([\w.-]+)\s*(.*)", line).groups() for line in lines if line.strip() and not line.startswith("#")]
    return {name.lower(): specifier for name, specifier in parsed}


def imported(script: str) -> set[str]:
    """Top-level names of all modules that a script imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{script}.py has a relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """--help of every script, each copied alone into an empty folder, started together to share the wait."""
    started = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp(script)
        shutil.copy(ROOT / f"{script}.py", folder)
        # Isolated: neither the script's folder, nor PYTHONPATH, nor the user's packages are on the path.
        command = [sys.executable, "-I", f"{script}.py", "--help"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started[script] = subprocess.Popen(command, cwd=folder, text=True, **pipes)
    done = {}
    for script, process in started.items():
        out, err = process.communicate(timeout=300)
        done[script] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_alone_in_an_empty_folder(script, helps):
    assert helps[script].returncode == 0, helps[script].stderr[-2000:]
    assert helps[script].stdout.startswith(f"usage: {script}.py")
    assert helps[script].stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_no_file_of_this_repository(script):
    paths = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "launch").rglob("*.py")]
    siblings = {"tests", "launch", *(path.stem for path in paths)}
    assert imported(script) & siblings == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_its_dependencies_as_requirements_txt_does(script):
    block = metadata(script)
    assert block["requires-python"] == ">=3.10"
    ours, all_of_them = requirements(block["dependencies"]), requirements((ROOT / "requirements.txt").read_text().splitlines())
    assert {name: all_of_them.get(name) for name in ours} == ours


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_everything_that_it_imports(script):
    packages = {PACKAGE_OF.get(name, name) for name in imported(script) - set(sys.stdlib_module_names)}
    named = set(requirements(metadata(script)["dependencies"]))
    assert packages <= named, f"imported but not named: {sorted(packages - named)}"
    assert named - packages <= INDIRECT, f"named but not imported: {sorted(named - packages - INDIRECT)}"


def test_what_is_installed_satisfies_requirements_txt():
    from packaging.specifiers import SpecifierSet

    for name, specifier in requirements((ROOT / "requirements.txt").read_text().splitlines()).items():
        assert importlib.metadata.version(name) in SpecifierSet(specifier), name
