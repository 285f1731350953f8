# SPDX-License-Identifier: Apache-2.0
"""The structure of the program: sizes, circles, directions, names. Each rule is also seen to find a breach of it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import PROJECT

LINES, CLASS_LINES = 450, 250
ORDER = (
    *(
        "record",
        "model",
        "units",
        "kernel",
        "editor",
        "parser",
        "system",
        "planner",
        "device",
        "boot",
        "vm",
        "nvdimm",
    ),
    *("verifier", "doctor", "report", "demo", "cli"),
)
"""A package imports from those before it only."""
COLLECTION = "collection"
"""No package: what Ansible copies to other machines. It may not be too long either."""


@cache
def tree_of(path: Path) -> ast.Module:
    """A module, parsed once for all that look at it."""
    return ast.parse(path.read_text())


def modules(root: Path) -> dict[str, ast.Module]:
    """The trees of all modules by name, as `boot.grub.menu`, of the package in this folder."""
    found = (p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] != COLLECTION)
    paths = {p: p.relative_to(root).with_suffix("") for p in found}
    return {".".join(n.parts).removesuffix(".__init__"): tree_of(p) for p, n in paths.items()}


def imported(trees: Mapping[str, ast.Module], name: str) -> set[str]:
    """The modules of the package that one of them imports, in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "emupmem":
            base = (node.module or "").removeprefix("emupmem").removeprefix(".")
            names = [f"{base}.{n.name}".removeprefix(".") for n in node.names]
            found |= {n if n in trees else base for n in names}
        elif isinstance(node, ast.Import):
            found |= {n.name.removeprefix("emupmem.") for n in node.names if n.name.startswith("emupmem.")}
    return found & set(trees) - {name}


def circle(trees: Mapping[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle, empty where there is none."""
    try:
        TopologicalSorter({name: imported(trees, name) for name in trees}).prepare()
    except CycleError as exc:
        return list(exc.args[1])
    return []


def upwards(trees: Mapping[str, ast.Module]) -> list[tuple[str, str]]:
    """(module, what it imports) where the packages are in the wrong order."""
    rank = {name: at for at, name in enumerate(ORDER)}
    pairs = [(a, b) for a in trees for b in imported(trees, a) if a.split(".")[0] in rank]
    return [(a, b) for a, b in pairs if rank.get(b.split(".")[0], 0) > rank[a.split(".")[0]]]


def twice(trees: Mapping[str, ast.Module]) -> set[str]:
    """Public functions and classes that two modules define."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = Counter(n.name for tree in trees.values() for n in tree.body if isinstance(n, kinds))
    return {name for name, count in names.items() if count > 1 and not name.startswith("_")}


def too_long(root: Path) -> Iterator[str]:
    """Files and classes with more lines than they may have."""
    for path in sorted(root.rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(root))
        if len(text.splitlines()) > LINES:
            yield name
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > CLASS_LINES:
                    yield f"{name}:{node.name}"


HERE = PROJECT / "emupmem"


def test_nothing_is_too_long() -> None:
    assert list(too_long(HERE)) == []


def test_no_circle() -> None:
    assert circle(modules(HERE)) == []


def test_one_direction() -> None:
    assert upwards(modules(HERE)) == []
    packages = {n.split(".")[0] for n in modules(HERE)} - {"__init__", "__main__"}
    assert packages == set(ORDER), "every package has its place"


def test_one_name_for_one_thing() -> None:
    assert twice(modules(HERE)) == set()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A package that breaks each of these rules."""
    texts = {
        "kernel/a.py": "from emupmem.boot import b\ndef same(): ...\n",
        "boot/b.py": "def same():\n    from emupmem.kernel import a\n",
        "cli/long.py": "class Long:\n" + "    x = 1\n" * 450,
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_breach_of_each_rule_is_found(toy: Path) -> None:
    trees = modules(toy)
    assert set(circle(trees)) == {"kernel.a", "boot.b"}
    assert upwards(trees) == [("kernel.a", "boot.b")]
    assert twice(trees) == {"same"}
    assert list(too_long(toy)) == ["cli/long.py", "cli/long.py:Long"]


def test_the_readme_is_one_page_for_users() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 180
