"""Each script stands alone: copied into an empty folder it still runs, and it lists what it needs."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys

import pytest
from common import ROOT
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest installs tomli
    import tomli as tomllib

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PACKAGE_OF = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "vendi_score": "vendi-score",
}
# Needed without an import: peft by diffusers for adapters, tensorboard by accelerate for its logs, torchvision by
# transformers, torch-fidelity by torchmetrics, bitsandbytes by a flag.
INDIRECT = {"peft", "tensorboard", "torchvision", "torch-fidelity", "bitsandbytes"}


def parse_requirements(lines):
    """Return version specifiers by package."""
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {requirement.name.lower(): requirement.specifier for requirement in parsed}


ALL = parse_requirements((ROOT / "requirements.txt").read_text().splitlines())


# One process for all, since most of the time is for importing torch and diffusers.
HELP_OF_ALL = """
import os, runpy, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    (script,) = os.listdir()
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0
"""


def test_each_runs_alone_in_an_empty_folder(tmp_path):
    for script in SCRIPTS:
        (tmp_path / script).mkdir()
        shutil.copy(ROOT / f"{script}.py", tmp_path / script)
    # -I: neither the working folder nor PYTHONPATH nor the user's packages are on the path.
    # torch 2.6 warns of autocast without CUDA as soon as diffusers is imported.
    isolated = [sys.executable, "-I", "-W", "ignore::UserWarning:torch.amp.autocast_mode"]
    command = [*isolated, "-c", HELP_OF_ALL, *(tmp_path / script for script in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert re.findall(r"^usage: (\w+)\.py", done.stdout, re.MULTILINE) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_lists_what_it_imports(script):
    source = (ROOT / f"{script}.py").read_text()
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", source)
    metadata = tomllib.loads("\n".join(line[2:] for line in block[1].splitlines()))
    listed = parse_requirements(metadata["dependencies"])
    assert metadata["requires-python"] == ">=3.10" and listed.items() <= ALL.items()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    siblings = {path.stem for path in ours}
    assert not imported & siblings
    packages = {PACKAGE_OF.get(name, name) for name in imported - set(sys.stdlib_module_names)}
    assert packages <= listed.keys() <= packages | INDIRECT


def test_what_is_installed_satisfies_requirements_txt():
    for name, specifier in ALL.items():
        assert importlib.metadata.version(name) in specifier, name
