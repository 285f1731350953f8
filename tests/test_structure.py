# SPDX-License-Identifier: Apache-2.0
"""The structure of the program: sizes, circles, directions, names. Each rule is also seen to find a breach of it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

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


class Import(NamedTuple):
    """One `import a` (no module) or `from module import a`, and whether it is in a function."""

    module: str
    names: tuple[str, ...]
    line: int
    late: bool


class Seen(NamedTuple):
    """What the rules need of a module: a tree that is kept makes every later test of the process slower."""

    imports: tuple[Import, ...]
    classes: tuple[tuple[str, int], ...]
    top: tuple[str, ...]


@cache
def seen_in(path: Path) -> Seen:
    """A module, parsed once for all that look at it: its imports, its classes with their lines, its own names."""
    tree = ast.parse(path.read_text())
    imports: list[Import] = []
    classes: list[tuple[str, int]] = []
    for node, late in statements(tree, False):
        if isinstance(node, ast.Import):
            imports.append(Import("", tuple(n.name for n in node.names), node.lineno, late))
        elif isinstance(node, ast.ImportFrom):
            imports.append(Import(node.module or "", tuple(n.name for n in node.names), node.lineno, late))
        elif isinstance(node, ast.ClassDef):
            classes.append((node.name, (node.end_lineno or 0) - node.lineno + 1))
    top = tuple(n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return Seen(tuple(imports), tuple(classes), top)


def statements(node: ast.AST, late: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All statements below a node, and whether a function holds them."""
    inside = late or isinstance(node, ast.FunctionDef)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child, inside
            yield from statements(child, inside)


def modules(root: Path) -> dict[str, Seen]:
    """All modules by name, as `boot.grub.menu`, of the package in this folder."""
    found = (p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] != COLLECTION)
    paths = {p: p.relative_to(root).with_suffix("") for p in found}
    return {".".join(n.parts).removesuffix(".__init__"): seen_in(p) for p, n in paths.items()}


def imported(there: Mapping[str, Seen], name: str) -> set[str]:
    """The modules of the package that one of them imports, in functions and for types too."""
    found: set[str] = set()
    for one in there[name].imports:
        if one.module.split(".")[0] == "emupmem":
            base = one.module.removeprefix("emupmem").removeprefix(".")
            names = [f"{base}.{n}".removeprefix(".") for n in one.names]
            found |= {n if n in there else base for n in names}
        elif not one.module:
            found |= {n.removeprefix("emupmem.") for n in one.names if n.startswith("emupmem.")}
    return found & set(there) - {name}


def circle(there: Mapping[str, Seen]) -> list[str]:
    """Modules that import each other in a circle, empty where there is none."""
    try:
        TopologicalSorter({name: imported(there, name) for name in there}).prepare()
    except CycleError as exc:
        return list(exc.args[1])
    return []


def upwards(there: Mapping[str, Seen]) -> list[tuple[str, str]]:
    """(module, what it imports) where the packages are in the wrong order."""
    rank = {name: at for at, name in enumerate(ORDER)}
    pairs = [(a, b) for a in there for b in imported(there, a) if a.split(".")[0] in rank]
    return [(a, b) for a, b in pairs if rank.get(b.split(".")[0], 0) > rank[a.split(".")[0]]]


def twice(there: Mapping[str, Seen]) -> set[str]:
    """Public functions and classes that two modules define."""
    names = Counter(name for seen in there.values() for name in seen.top)
    return {name for name, count in names.items() if count > 1 and not name.startswith("_")}


def too_long(root: Path) -> Iterator[str]:
    """Files and classes with more lines than they may have."""
    for path in sorted(root.rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(root))
        if len(text.splitlines()) > LINES:
            yield name
        for kind, lines in seen_in(path).classes:
            if lines > CLASS_LINES:
                yield f"{name}:{kind}"


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
    there = modules(toy)
    assert set(circle(there)) == {"kernel.a", "boot.b"}
    assert upwards(there) == [("kernel.a", "boot.b")]
    assert twice(there) == {"same"}
    assert list(too_long(toy)) == ["cli/long.py", "cli/long.py:Long"]


def test_the_readme_is_one_page_for_users() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 180
