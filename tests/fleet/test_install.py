# SPDX-License-Identifier: Apache-2.0
"""The role installs on a played machine: the Debian package, or by pipx, with the real apt, dpkg, pipx, pip and gcc."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import PROJECT, test_wheel
from tests.fleet import mirror
from tests.fleet.hosts import Fleet
from tests.scenario import tree
from tests.scenario.machine import Scenario, lacking
from tests.scenario.test_grub import BOOKWORM, bookworm
from tests.vm import package
from tests.vm.machine import run

pytestmark = pytest.mark.scenario(seconds=20)

LIBRARIES = "/usr/lib/python3/dist-packages/libraries.pth"


def bare(folder: Path) -> Path:
    """The package without what it depends on, for which there is no network in a scenario."""
    tree, made = folder / "bare", folder / "emupmem.deb"
    run(["dpkg-deb", "-R", str(package.package()), str(tree)])
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^(Depends|Recommends): .*\n", "", control.read_text(), flags=re.MULTILINE))
    run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(made)])
    return made


WHERE = """
import json, os, sys
there = "ansible.module_utils.basic" in sys.modules
print(json.dumps({"changed": there, "would_change": there, "diff": "", "words": sys.argv[1:]}))
"""


def test_the_role_installs_the_package(tmp_path: Path) -> None:
    if why := lacking() or package.lacking():
        pytest.skip(f"no scenarios with the package: {why}")
    # The libraries are those of this Debian's virtual environment.
    files = {**BOOKWORM.files, LIBRARIES: "/opt/emupmem/lib/python3.11/site-packages\n"}
    host = replace(BOOKWORM, files=files, removed=[*BOOKWORM.removed, "emupmem"])
    wanted: dict[str, Any] = {
        "emupmem_install": "deb",
        "emupmem_deb": str(bare(tmp_path)),
        "emupmem_size": "2G",
    }
    wanted |= {"emupmem_reboot": False, "emupmem_trial": False, "emupmem_mount": ["/mnt/pmem0"]}
    with Scenario(host) as machine, Fleet({"new": machine}, tmp_path / "control") as fleet:
        bookworm(lambda _: machine)
        for changed in (True, False):
            told = fleet.play([], roles=[{"role": "emupmem.emupmem.emupmem", "vars": wanted}])
            assert told.status == 0, list(told.results.values())
            installed = told.of("Install the Debian package")["new"]
            assert (installed["_kind"], installed["changed"]) == ("ok", changed)
            reserved = told.of("Reserve the memory")["new"]
            assert (reserved["changed"], reserved["memmap"]) == (changed, "memmap=2G!4G")
            assert reserved["reboot_required"] is True
            assert told.of("Mount it at every boot")["new"]["_kind"] == "skipped", "not before the restart"
        assert machine.run("dpkg", "-s", "emupmem").status == 0
        assert machine.must("emupmem", "--version").startswith("emupmem ")
        for program, words in (("plain", ""), ("isolated", " -I")):
            machine.write(f"/opt/{program}", f"#!/usr/bin/python3{words}\n{WHERE}", 0o755)
        for program, end in (
            ("raises", "raise ValueError('as said')"),
            ("killed", "os.kill(os.getpid(), 9)"),
        ):
            machine.write(f"/opt/{program}", f"#! /usr/bin/python3\nimport os\n{end}\n", 0o755)
        the_program_is_called(fleet, machine)


def the_program_is_called(fleet: Fleet, machine: Scenario) -> None:
    """Where the same Python starts it, the module's own process is copied for it; nobody can tell from the answers."""

    def asked(program: str, **options: Any) -> dict[str, Any]:
        task = {"name": "it", "emupmem.emupmem.reservation": {**options, "program": program}}
        result = fleet.play([task]).of("it")["new"]
        result.pop("invocation", None)
        return result

    plain, isolated = (asked(f"/opt/{n}", state="absent") for n in ("plain", "isolated"))
    assert (plain["changed"], isolated["changed"]) == (True, False)
    assert plain["words"] == isolated["words"] == ["remove", "--yes", "--json"]
    assert asked("/opt/raises", state="absent")["msg"].endswith("ValueError: as said")
    assert "ended with status -9: emupmem said nothing" in asked("/opt/killed", state="absent")["msg"]
    machine.write("/opt/other", '#!/bin/sh\nexec emupmem "$@"\n', 0o755)
    for options in ({"size": "1 GB"}, {"size": "3G"}, {"size": "2G"}, {"state": "confirmed"}):
        assert asked("/usr/bin/emupmem", **options) == asked("/opt/other", **options), options


NEEDED = ("pipx", "libaugeas0", "gcc", "python3-dev", "libaugeas-dev", "pkg-config")
PLACE = "/var/repository"
PIP = f"[global]\nno-index = true\nfind-links = {PLACE}\n[install]\nno-compile = true\n"
PIPX_TASKS = ("Install what emupmem needs beside Python, of Debian", "Install emupmem for all users")


def without_network(folder: Path) -> dict[str, Any]:
    """Files by which a machine has Debian's packages and PyPI's, and the wheel of this tree, on its own disk."""
    try:
        made = mirror.repository(tree.tree(BOOKWORM.tree), "bookworm", NEEDED, ["python-augeas"])
    except RuntimeError as exc:
        pytest.skip(f"no packages without a network: {str(exc).splitlines()[-1].strip()}")
    _, wheel = test_wheel.build(PROJECT, folder)
    files: dict[str, Any] = {f"{PLACE}/{f.name}": f.read_bytes() for f in (*made.iterdir(), wheel)}
    return {**files, "/etc/apt/sources.list": f"deb [trusted=yes] file:{PLACE} ./\n", "/etc/pip.conf": PIP}


def test_the_role_installs_by_pipx(tmp_path: Path) -> None:
    """Where there is nothing but Python: Debian's compiler makes python-augeas, of which there is no wheel."""
    if why := lacking() or mirror.lacking():
        pytest.skip(f"no scenarios with packages: {why}")
    files = {**BOOKWORM.files, **without_network(tmp_path / "dist")}
    (wheel,) = (name for name in files if "/emupmem-" in name)
    host = replace(BOOKWORM, files=files, removed=[*BOOKWORM.removed, "emupmem"])
    role = {"name": "emupmem.emupmem.emupmem", "tasks_from": "install"}
    wanted = {"emupmem_install": "pipx", "emupmem_package": wheel}
    install = {"name": "Install", "ansible.builtin.include_role": role, "vars": wanted}
    reserve = {"name": "it", "emupmem.emupmem.reservation": {"size": "2G"}}
    with Scenario(host) as machine, Fleet({"new": machine}, tmp_path / "control") as fleet:
        bookworm(lambda _: machine)
        for tasks, changed in (([install, reserve], True), ([install], False)):
            told = fleet.play(tasks)
            assert told.status == 0, list(told.results.values())[-1]
            installed = [told.of(task)["new"] for task in PIPX_TASKS]
            assert {i["_kind"] for i in installed} == {"ok" if changed else "skipped"}
            assert {i["changed"] for i in installed} == {changed}
            if changed:
                assert told.of("it")["new"]["memmap"] == "memmap=2G!4G"
        place = machine.must("readlink", "-f", "/usr/local/bin/emupmem").strip()
        assert place == "/opt/pipx/venvs/emupmem/bin/emupmem"
        assert machine.must("emupmem", "--version").startswith("emupmem ")
