"""The scripts stand alone, so some functions stand in several of them. This test keeps the copies identical.

A copy has `# Copied from <script>.<name>` directly above it. `python tests/test_copies.py --fix` rewrites every copy
from its owner.
"""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "train_full",
    "train_peft",
    "sample",
    "eval_generation",
    "eval_downstream",
    "launch/report",
    "launch/benchmark",
    "launch/make_table",
]
# Each script has its own function of this name.
OWN = {"main", "parse_args", "build_loss", "save_model", "usage_example"}
MARKER = re.compile(r"# Copied from (\w+)\.(\w+)$")


def top_level_objects(source):
    """Return {name: (first line, last line, marker)} of functions, classes and constants; from 0, last exclusive."""
    lines, found = source.splitlines(), {}
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


def used_names(source):
    """Return the names that a script reads outside the object of the same name."""
    used = set()
    for node in ast.parse(source).body:
        own = getattr(node, "name", None)
        used |= {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id != own
        }
    return used


def check_copy(script, name, objects, lines):
    """Return what is wrong with one marked copy, or None."""
    first, last, marker = objects[script][name]
    owner, original = MARKER.match(marker).groups()
    if original != name:
        return f"{script}.{name} is marked as a copy of another name, {owner}.{original}"
    if name not in objects.get(owner, {}):
        return f"{script}.{name}: {owner}.{name} does not exist"
    start, end, owners_marker = objects[owner][name]
    if owners_marker:
        return f"{script}.{name}: {owner}.{name} is a copy itself; name its owner"
    if lines[script][first:last] != lines[owner][start:end]:
        return f"{script}.{name} differs from {owner}.{name}; run python tests/test_copies.py --fix"
    return None


def check(sources):
    """Return everything that is wrong with the copies of a set of scripts, a sentence each."""
    objects = {script: top_level_objects(source) for script, source in sources.items()}
    lines = {script: source.splitlines() for script, source in sources.items()}
    problems, owners = [], {}
    for script, named in objects.items():
        marked, used = {marker for _, _, marker in named.values() if marker}, used_names(sources[script])
        for line in lines[script]:
            if MARKER.match(line.strip()) and line not in marked:
                problems.append(f"{script}: {line.strip()!r} is above nothing")
        for name, (_, _, marker) in named.items():
            if marker:
                problems.append(check_copy(script, name, objects, lines))
                if name not in used and name != "main":
                    problems.append(f"{script}.{name} is a copy that the script does not use")
            elif name not in OWN:
                if name in owners:
                    problems.append(f"{script}.{name} has the name of {owners[name]}.{name} and no marker")
                owners.setdefault(name, script)
    return [problem for problem in problems if problem]


def fix(sources):
    """Return the scripts with every copy rewritten from its owner."""
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


def read_scripts():
    return {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def test_copies_are_identical_and_used():
    assert check(read_scripts()) == []


def test_every_kind_of_drift_is_found():
    owner = "A = 1\n\n\ndef f(x):\n    # why\n    return x\n"
    copied = "# Copied from a.f\ndef f(x):\n    # why\n    return x\n\n\nf(1)\n"
    assert check({"a": owner, "b": copied}) == []
    assert "differs" in check({"a": owner, "b": copied.replace("why", "how")})[0]
    assert "no marker" in check({"a": owner, "b": "def f(x):\n    return x\n"})[0]
    assert "no marker" in check({"a": owner, "b": "A = 1\n"})[0]
    assert "does not exist" in check({"a": owner, "b": "# Copied from a.g\ndef g():\n    pass\n\n\ng()\n"})[0]
    assert "another name" in check({"a": owner, "b": "# Copied from a.f\ndef g(x):\n    return x\n\n\ng(1)\n"})[0]
    assert "above nothing" in check({"a": owner, "b": "# Copied from a.f\n\nprint()\n"})[0]
    assert "copy itself" in check({"a": owner, "b": copied, "c": copied.replace("a.f", "b.f")})[0]
    assert "does not use" in check({"a": owner, "b": copied.replace("f(1)", "")})[0]
    recursive = "# Copied from a.f\ndef f(x):\n    return f(x)\n"
    assert "does not use" in check({"a": recursive.replace("# Copied from a.f\n", ""), "b": recursive})[0]
    assert fix({"a": owner, "b": copied.replace("return x", "return -x")})["b"] == copied


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="rewrite the copies from their owners")
    if parser.parse_args().fix:
        for script, text in fix(read_scripts()).items():
            (ROOT / f"{script}.py").write_text(text)
    print("\n".join(check(read_scripts())) or "the copies are identical")
