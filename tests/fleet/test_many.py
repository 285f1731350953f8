# SPDX-License-Identifier: Apache-2.0
"""Twenty hosts in one play, and what goes wrong on one of them: the others go on, and the next run finishes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import many
from tests.fleet.hosts import Fleet
from tests.scenario.machine import Host, Play, Scenario, diff, lacking, lacking_disk
from tests.scenario.test_grub import BOOKWORM, bookworm

pytestmark = pytest.mark.scenario(seconds=60)


@pytest.fixture(autouse=True)
def _there() -> None:
    if why := lacking():
        pytest.skip(f"no scenarios: {why}")


def test_twenty_loaders_in_one_play(tmp_path: Path) -> None:
    """Each host is told by its own loader, or says by whom it is: nothing is half done."""
    with many.hosts(tmp_path / "hosts") as hosts, Fleet(hosts, tmp_path / "control") as fleet:
        assert len(hosts) >= 20
        before = {name: machine.snapshot() for name, machine in hosts.items()}
        told = fleet.play([{"name": "it", "emupmem.emupmem.reservation": {"size": "1G"}}], "--forks", "20")
        ended = told.of("it")
        assert set(ended) == set(hosts), told.text
        for name, (_, reason, way) in many.OWNED.items():
            assert ended[name]["_kind"] == "failed", name
            assert reason in ended[name]["msg"], ended[name]["msg"]
            assert way in ended[name]["msg"], ended[name]["msg"]
            assert diff(before[name], hosts[name].snapshot()) == {}
        done = {(n, ended[n]["changed"], ended[n]["memmap"]) for n in many.TOLD}
        assert done == {(n, True, "memmap=1G!4G") for n in many.TOLD}


AS_NOBODY = """#!/bin/sh
exec setpriv --reuid=65534 --regid=65534 --clear-groups /usr/local/bin/emupmem "$@"
"""


@pytest.fixture
def plays() -> Iterator[Play]:
    """Starts hosts that end with the test."""
    with ExitStack() as stack:
        yield lambda host: stack.enter_context(Scenario(host))


def with_boot(plays: Play, size: int, host: Host = BOOKWORM) -> Scenario:
    """A host with a /boot that GRUB can write to, or that is full soon."""
    if why := lacking_disk("ext4"):
        pytest.skip(f"no scenarios with a disk: {why}")
    machine = plays(replace(host, disks=[("/boot", "ext4", size)]))
    machine.must("mkdir", "-p", "/boot/grub")
    return bookworm(lambda _: machine, host)


def test_what_fails_says_so_and_the_next_run_finishes_it(plays: Play, tmp_path: Path) -> None:
    hosts = {name: bookworm(plays) for name in ("well", "gone", "user", "no-sudo")}
    hosts["no-python"] = bookworm(plays, replace(BOOKWORM, removed=("python3",)))
    hosts["full"] = with_boot(plays, 4 << 20)
    hosts["full"].run("dd", "if=/dev/zero", "of=/boot/filler", "bs=1k")
    hosts["user"].write("/usr/local/bin/as-nobody", AS_NOBODY, 0o755)
    with Fleet(hosts, tmp_path) as fleet:
        fails_then_finishes(fleet, hosts)


def fails_then_finishes(fleet: Fleet, hosts: dict[str, Scenario]) -> None:
    def run(program: str = "") -> dict[str, dict[str, Any]]:
        options = {
            "size": "1G",
            "program": f"{{{{ {program!r} if inventory_hostname == 'user' else omit }}}}",
        }
        task = {"name": "it", "emupmem.emupmem.reservation": options if program else {"size": "1G"}}
        become = {"become": "{{ inventory_hostname == 'no-sudo' }}"}
        return fleet.play([{**task, **become}], "--forks", "6").of("it")

    before = {name: machine.snapshot() for name, machine in hosts.items()}
    fleet.unreachable.add("gone")
    ended = run("/usr/local/bin/as-nobody")
    assert ended["well"]["changed"] is True, ended["well"]
    assert ended["gone"]["_kind"] == "unreachable"
    assert "no route to host" in ended["gone"]["msg"]
    assert "needs root" in ended["user"]["msg"]
    assert "sudo: not found" in ended["no-sudo"]["module_stderr"]
    assert ended["no-python"]["msg"] == "The module interpreter '/usr/bin/python3' was not found."
    assert "No space left on device; the disk is full" in ended["full"]["msg"]
    assert "the old configuration is back, nothing is changed" in ended["full"]["msg"]
    changed = {name for name, machine in hosts.items() if diff(before[name], machine.snapshot())}
    assert changed == {"well"}, "no host is half done"

    fleet.unreachable.clear()
    hosts["full"].remove("/boot/filler")
    hosts["no-sudo"].write(
        "/usr/local/bin/sudo", '#!/bin/sh\nwhile [ "$1" != -u ]; do shift; done\nshift 2\nexec "$@"\n', 0o755
    )
    hosts["no-python"].must("ln", "-s", "python3.11", "/usr/bin/python3")
    again = run()
    assert {n: r.get("changed") for n, r in again.items()} == {n: n != "well" for n in again}, again
    assert {r["memmap"] for r in again.values()} == {"memmap=1G!4G"}


def test_a_restart_that_never_ends(plays: Play, tmp_path: Path) -> None:
    """The role says how the host stands; run again it finds the trial that waits, and restarts the host."""
    never = with_boot(plays, 64 << 20, replace(BOOKWORM, programs={"shutdown": "#!/bin/sh\n"}))
    wanted = {"emupmem_size": "2G", "emupmem_reboot_timeout": 1}
    with Fleet({"never": never}, tmp_path) as fleet:
        for changed in (True, False):
            told = fleet.play([], roles=[{"role": "emupmem.emupmem.emupmem", "vars": wanted}])
            assert told.status == 2, told.text
            reserved = told.of("Reserve the memory")["never"]
            assert (reserved["changed"], reserved["reboot_required"]) == (changed, True)
            said = told.of("Say how the host stands")["never"]["msg"]
            assert "never did not come back within 1 seconds" in said
            assert (
                "Reset the host: the next start is the old configuration (with rpm-ostree it is the trial"
                in said
            )
    assert "memmap" not in never.read("/etc/default/grub")
