# SPDX-License-Identifier: Apache-2.0
"""A wheel of the tree holds every module, and runs where the tree is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PROJECT
from tests.fake import LOG


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip installs of the project, built from a copy: a build leaves files behind."""
    copy, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    shutil.copytree(PROJECT / "emupmem", copy / "emupmem", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True)
    return target


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
