# SPDX-License-Identifier: Apache-2.0
"""A namespace that is there already, as programs ask for it that run again and again; names; what would be lost."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import MIB, EmupmemError
from emupmem.nvdimm.view import BUS, look_at_nvdimms
from emupmem.nvdimm.wish import NamespaceWish, check_options, namespace_like
from tests.cli.runner import Run
from tests.fake import FakeMachine, put, running
from tests.nvdimm.test_nvdimm import buses, labelless, nvdimm_machine, ran, region, space

DB = space("namespace0.1", "devdax", 28 * MIB, name="db", map="mem", align=2 * MIB)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A region with a namespace of 64 MiB, one with the name db, one that is disabled; one without labels."""
    made = nvdimm_machine(tmp_path / "machine")
    here = (space("namespace0.0", map="dev"), DB, space("namespace0.2", "raw", state="disabled", name="off"))
    buses(
        made,
        region("region0", *here, free=384 * MIB, dimms=("nmem0",)),
        region("region1", space("namespace1.0")),
    )
    labelless(made, "region1")
    for name, size in (
        ("namespace0.0", 64),
        ("namespace0.1", 32),
        ("namespace0.2", 32),
        ("namespace1.0", 512),
    ):
        put(made, f"{BUS}/{name}/size", f"{size * MIB}\n")
    return made


@pytest.fixture
def run(run: Run, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> Run:
    running(monkeypatch.setattr, machine)
    return functools.partial(run, "nvdimm")


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ({}, "namespace0.0"),
        ({"size": 64 * MIB}, "namespace0.0"),
        ({"size": 62 * MIB}, ""),  # what is usable of it is not what it takes
        ({"size": 64 * MIB, "map": "dev"}, "namespace0.0"),
        ({"map": "mem"}, ""),
        ({"mode": "devdax", "align": 2 * MIB}, "namespace0.1"),
        ({"mode": "devdax", "align": 4096}, ""),
        ({"mode": "raw"}, ""),  # the one that is disabled gives no device
        ({"region": "region1"}, "namespace1.0"),  # where no region is named, none without labels is chosen
        ({"region": "region1", "size": 512 * MIB}, "namespace1.0"),
        ({"mode": "devdax", "name": "db"}, "namespace0.1"),
        ({"mode": "devdax", "name": "db", "region": "region0", "size": 32 * MIB}, "namespace0.1"),
        ({"name": "other"}, ""),
    ],
)
def test_which_one_is_like_that(machine: FakeMachine, wish: dict[str, Any], name: str) -> None:
    found = namespace_like(look_at_nvdimms(machine), NamespaceWish(**wish))
    assert (found.name if found else "") == name


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"name": "db"}, "db is there, namespace0.1, but its mode is devdax"),
        ({"name": "db", "mode": "devdax", "size": 64 * MIB}, "but it has 32 MiB"),
        ({"name": "db", "mode": "devdax", "map": "dev", "align": 4096}, "in mem and it is aligned to 2 MiB"),
        ({"name": "db", "mode": "devdax", "region": "region1"}, "but it is on region0"),
        ({"name": "off", "mode": "raw"}, "namespace0.2, but it is disabled"),
    ],
)
def test_a_name_belongs_to_one(machine: FakeMachine, wish: dict[str, Any], why: str) -> None:
    with pytest.raises(EmupmemError, match=why) as caught:
        namespace_like(look_at_nvdimms(machine), NamespaceWish(**wish))
    assert "if nothing of it is needed" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["", "a" * 64, "two words", "-x", "é", "a\n", "namespace0.0", "pmem0", "dax0.1"]
)
def test_names_that_are_none(name: str) -> None:
    if not name:
        assert check_options("fsdax", "", "", name) == 0
        return
    with pytest.raises(EmupmemError, match=r"cannot be the name|looks like a name that the kernel gives"):
        check_options("fsdax", "", "", name)


def test_it_is_made_once(machine: FakeMachine, run: Run) -> None:
    words = ("create", "--size", "32M", "--mode", "sector", "--name", "log", "--if-not-exists")
    would = run(*words, "--check", "--json")
    assert (would.status, would.json["changed"], would.json["would_change"]) == (3, False, True)
    assert (would.json["region"], would.json["loses"], ran(machine)) == ("region0", None, [])
    log = space("namespace0.3", "sector", 31 * MIB, name="log")
    there = json.loads((machine.root / "buses").read_text())
    there[0]["regions"][0]["namespaces"].insert(0, log)
    put(machine, "/then", json.dumps(there))
    put(machine, f"{BUS}/namespace0.3/size", f"{32 * MIB}\n")
    put(machine, "/dev/pmem0.3s", "")
    made = run(*words, "--json")
    assert (made.status, made.json["changed"], made.json["would_change"]) == (0, True, True)
    assert (made.json["device"], made.json["namespace"]["alt_name"]) == ("/dev/pmem0.3s", "log")
    assert ran(machine) == [f"ndctl create-namespace -r region0 -m sector -s {32 * MIB} -n log"]

    again = run(*words, "--json")
    assert (again.status, again.json["changed"], again.json["would_change"]) == (0, False, False)
    assert (again.json["device"], again.json["commands"]) == ("/dev/pmem0.3s", [])
    assert (
        run(*words, "--check").out
        == "namespace0.3 is like that already, /dev/pmem0.3s. Nothing was changed.\n"
    )
    assert "namespace0.3 has the name log\n" in run(*words[:-1]).err
    assert "namespace0.3 (log)  sector" in run("show").out
    assert len(ran(machine)) == 1


def test_what_would_be_lost_is_said(machine: FakeMachine, run: Run) -> None:
    words = ("create", "--region", "region1", "--mode", "devdax", "--if-not-exists")
    would = run(*words, "--check", "--json")
    assert (would.status, would.json["loses"]["name"]) == (3, "namespace1.0")
    refused = run(*words, "--json")
    assert (refused.status, refused.json["loses"]["name"], refused.json["changed"]) == (
        1,
        "namespace1.0",
        False,
    )
    named = run(*words, "--name", "db2")
    assert named.err.splitlines()[0].endswith("region1 has no labels, which keep the names of namespaces")
    assert ran(machine) == []


def test_it_is_destroyed_once(machine: FakeMachine, run: Run) -> None:
    would = run("destroy", "db", "--if-exists", "--check", "--json")
    assert (would.status, would.json["loses"]["name"], would.json["would_change"]) == (
        3,
        "namespace0.1",
        True,
    )
    buses(machine, region("region0", dimms=("nmem0",)), file="then")
    gone = run("destroy", "db", "--if-exists", "--yes", "--json")
    assert (gone.status, gone.json["changed"], gone.json["namespace"]["name"]) == (0, True, "namespace0.1")
    again = run("destroy", "db", "--if-exists", "--yes", "--json")
    assert (again.status, again.json["changed"], again.json["would_change"]) == (0, False, False)
    assert run("destroy", "db", "--if-exists").out == "There is no namespace db. Nothing was changed.\n"
    assert run("destroy", "db", "--yes").status == 1
    assert ran(machine) == ["ndctl destroy-namespace -f namespace0.1"]


def test_a_name_that_is_there_twice_or_is_the_kernels(machine: FakeMachine, run: Run) -> None:
    """ndctl takes any name any number of times: none is destroyed by mistake."""
    odd = (space("namespace0.0"), space("namespace0.1", name="namespace0.0"))
    buses(machine, region("region0", *odd, dimms=("nmem0",)))
    assert run("destroy", "namespace0.0", "--check", "--json").json["loses"]["name"] == "namespace0.0"
    twice = (space("namespace0.0", name="db"), space("namespace0.1", name="db"))
    buses(machine, region("region0", *twice, dimms=("nmem0",)))
    both = run("destroy", "db", "--yes")
    assert both.err.splitlines() == [
        "emupmem: 2 namespaces have the name db",
        "         say which: namespace0.0, namespace0.1",
    ]
    assert run("destroy", "", "--yes").status == 2
    assert ran(machine) == []
