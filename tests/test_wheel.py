# SPDX-License-Identifier: Apache-2.0
"""A wheel of the tree holds every module, and runs where the tree is not; a source archive holds the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import PROJECT
from tests.fake import LOG

FILES = ("pyproject.toml", "README.md", "LICENSE", "Makefile")
FOLDERS = ("emupmem", "tests", ".packaging")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip installs of the project."""
    target = tmp_path_factory.mktemp("installed")
    _, wheel = build(PROJECT, tmp_path_factory.mktemp("dist"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def build(tree: Path, dist: Path) -> tuple[Path, Path]:
    """The source archive and the wheel of a tree, as every front end has them built."""
    code = (
        "import sys; from hatchling import build as b; b.build_sdist(sys.argv[1]); b.build_wheel(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(dist)], cwd=tree, check=True, capture_output=True)
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return archive, wheel


def copy_to(folder: Path) -> None:
    """The tree once more, without what git ignores."""
    for name in (*FILES, ".gitignore"):
        shutil.copy(PROJECT / name, folder)
    for name in FOLDERS:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def run(installed: Path, *words: str) -> str:
    """What the installed program prints, in a folder without the tree."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = (
        "import emupmem, runpy, sys; print(emupmem.__file__, file=sys.stderr); "
        "runpy.run_module('emupmem', run_name='__main__')"
    )
    argv = [sys.executable, "-c", code, *words]
    done = subprocess.run(argv, cwd=installed, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.startswith(str(installed))
    return done.stdout


@pytest.mark.slow(seconds=15)
def test_it_holds_every_module(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        found = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
        return {str(p) for p in found if "__pycache__" not in p.parts}

    assert files(installed / "emupmem") == files(PROJECT / "emupmem")


@pytest.mark.slow(seconds=15)
def test_it_runs(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert run(installed, "--version").startswith("emupmem ")
    for command in ("apply", "mount", "qemu", "nvdimm", "namespaces", "doctor", "verify"):
        assert f"{command} [OPTIONS]" in run(installed, command, "--help")
    assert json.loads(run(installed, "suggest", "--json", "--from", str(tmp_path / "log")))["plan"]


@pytest.mark.slow(seconds=15)
def test_two_builds_are_the_same_bytes_and_the_source_archive_is_whole(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        copy_to(tmp_path / name)
    one, other = tmp_path / "one", tmp_path / "other"
    for path in other.rglob("*.py"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
        path.chmod(0o600)
    for place in (one, other):
        (place / "dist").mkdir()
    first, second = build(one, one / "dist"), build(other, other / "dist")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]

    with tarfile.open(first[0]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in (*FILES, *FOLDERS):
        done = subprocess.run(
            ["diff", "-r", "-q", "-x", "__pycache__", str(one / name), str(unpacked / name)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "")
    (unpacked / "dist").mkdir()
    assert build(unpacked, unpacked / "dist")[1].read_bytes() == first[1].read_bytes()
