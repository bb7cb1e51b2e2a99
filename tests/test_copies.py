"""The scripts stand alone, so some functions stand in several of them; this keeps them identical.

A copy has `# Copied from <script>.<name>` directly above it. `python tests/test_copies.py --fix` rewrites every copy from
its owner.
"""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train_full", "train_peft", "sample", "eval_generation", "eval_downstream", "launch/report", "launch/benchmark"]
# What each script has of its own under the same name.
EXEMPT = {"logger", "main", "parse_args", "build_loss", "run_name"}
MARKER = re.compile(r"# Copied from (\w+)\.(\w+)$")


def top_level_objects(source: str) -> dict[str, tuple[int, int, str | None]]:
    """Name to (first line, last line, marker) of each function, class and constant; lines count from 0, last exclusive."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, first = node.targets[0].id, node.lineno - 1
        else:
            continue
        above = lines[first - 1] if first else ""
        found[name] = (first, node.end_lineno, above if MARKER.match(above) else None)
    return found


def check(sources: dict[str, str]) -> list[str]:
    """What is wrong with the copies of a set of scripts, a sentence each."""
    objects = {script: top_level_objects(source) for script, source in sources.items()}
    lines = {script: source.splitlines() for script, source in sources.items()}
    problems, owners = [], {}
    for script, named in objects.items():
        used = [line for line in lines[script] if MARKER.match(line.strip())]
        marked = [marker for _, _, marker in named.values() if marker]
        problems += [f"{script}: {line.strip()!r} stands above nothing" for line in used if line not in marked]
        for name, (first, last, marker) in named.items():
            if not marker:
                if name in owners and name not in EXEMPT:
                    problems.append(f"{script}.{name} has the name of {owners[name]}.{name} and no marker")
                owners.setdefault(name, script)
                continue
            owner, original = MARKER.match(marker).groups()
            if original != name:
                problems.append(f"{script}.{name} is marked as a copy of another name, {owner}.{original}")
            elif owner not in objects or name not in objects[owner]:
                problems.append(f"{script}.{name}: {owner}.{name} does not exist")
            elif objects[owner][name][2]:
                problems.append(f"{script}.{name}: {owner}.{name} is a copy itself; name its owner")
            else:
                start, end, _ = objects[owner][name]
                if lines[script][first:last] != lines[owner][start:end]:
                    problems.append(f"{script}.{name} differs from {owner}.{name}; run python tests/test_copies.py --fix")
    return problems


def fix(sources: dict[str, str]) -> dict[str, str]:
    """The scripts with every copy rewritten from its owner."""
    fixed = {}
    for script, source in sources.items():
        lines = source.splitlines()
        for name, (first, last, marker) in sorted(top_level_objects(source).items(), key=lambda item: -item[1][0]):
            if marker:
                owner = MARKER.match(marker)[1]
                start, end, _ = top_level_objects(sources[owner])[name]
                lines[first:last] = sources[owner].splitlines()[start:end]
        fixed[script] = "\n".join(lines) + "\n"
    return fixed


def read_scripts() -> dict[str, str]:
    return {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS if (ROOT / f"{name}.py").exists()}


def test_copies_are_identical():
    assert check(read_scripts()) == []


def test_every_kind_of_drift_is_found():
    owner = "A = 1\n\n\ndef f(x):\n    # why\n    return x\n"
    copied = "# Copied from a.f\ndef f(x):\n    # why\n    return x\n"
    assert check({"a": owner, "b": copied}) == []
    assert "differs" in check({"a": owner, "b": copied.replace("why", "how")})[0]
    assert "no marker" in check({"a": owner, "b": "def f(x):\n    return x\n"})[0]
    assert "no marker" in check({"a": owner, "b": "A = 1\n"})[0]
    assert "does not exist" in check({"a": owner, "b": "# Copied from a.g\ndef g():\n    pass\n"})[0]
    assert "another name" in check({"a": owner, "b": "# Copied from a.f\ndef g(x):\n    # why\n    return x\n"})[0]
    assert "stands above nothing" in check({"a": owner, "b": "# Copied from a.f\n\nprint()\n"})[0]
    assert "copy itself" in check({"a": owner, "b": copied, "c": copied.replace("a.f", "b.f")})[0]
    assert fix({"a": owner, "b": copied.replace("return x", "return -x")})["b"] == copied


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="rewrite the copies from their owners")
    if parser.parse_args().fix:
        for script, text in fix(read_scripts()).items():
            (ROOT / f"{script}.py").write_text(text)
    print("\n".join(check(read_scripts())) or "the copies are identical")
