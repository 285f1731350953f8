# SPDX-License-Identifier: Apache-2.0
"""A run of Ansible that changes nothing, beside its own `ping` there: `python -m tests.bench.fleet [HOSTS…]`.

The hosts are played ones. What counts is the processor's time of all that works, Ansible and hosts, for here they
share the processors; and that of Ansible alone, which is what counts where hosts have their own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.table import FLEET, Row
from tests.fleet.hosts import Fleet
from tests.scenario.machine import Scenario, lacking
from tests.scenario.test_grub import BOOKWORM, bookworm
from tests.scenario.tree import PROJECT_PLACE

TICKS = os.sysconf("SC_CLK_TCK")
SIZES = (20, 100)
PACKAGED = f"""
there=/usr/lib/python3/dist-packages
cp -r {PROJECT_PLACE}/emupmem $there/
echo /opt/emupmem/lib/python3*/site-packages > $there/libraries.pth
python3 -m compileall -q $there/emupmem
printf '%s\\n' '#!/usr/bin/python3' 'from emupmem.__main__ import start' 'start()' > /usr/bin/emupmem
chmod +x /usr/bin/emupmem
rm /usr/local/bin/emupmem
"""
"""As Debian's package has it, whose libraries this Debian lacks."""
TASKS: dict[str, dict[str, Any]] = {
    "ping": {"ansible.builtin.ping": {}},
    "reservation": {"emupmem.emupmem.reservation": {"size": "1G"}},
}


def fleet(sizes: Sequence[int] = SIZES) -> Row:
    """Measure it with a few hosts, and with many; hosts are few real ones under many names."""
    if why := lacking():
        return Row(FLEET, f"not measured: {why}")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        real = [bookworm(lambda host: stack.enter_context(Scenario(host)), BOOKWORM) for _ in range(10)]
        for machine in real:
            machine.must("/bin/sh", "-euc", PACKAGED)
            machine.must("/usr/bin/emupmem", "apply", "--size", "1G", "--yes")
        each: dict[tuple[str, int], Spent] = {}
        for size in sizes:
            hosts = {f"host{number}": real[number % len(real)] for number in range(size)}
            with Fleet(hosts, Path(folder) / str(size)) as made:
                for name, task in TASKS.items():
                    if size == sizes[0]:
                        _played(made, task)  # what the first run of all reads and compiles
                    each[name, size] = _spent(real, lambda m=made, t=task: _played(m, t), size)  # type: ignore[misc]
                    print(f"  {size:4} hosts  {name:12} {each[name, size]}")
    few, many = sizes[0], sizes[-1]
    ping, ours = each["ping", few], each["reservation", few]
    told = f"{ours.all / ping.all:.1f} times the CPU time of `ansible.builtin.ping`"
    told += f" ({ours.here / ping.here:.1f} times on the machine that runs Ansible)"
    growth = each["reservation", many].all / ours.all
    return Row(FLEET, f"{told}; with {many} hosts {growth:.2f} times the time per host that {few} take")


class Spent(NamedTuple):
    """Seconds of CPU time per host: of all, and of the machine that runs Ansible alone."""

    all: float
    here: float

    def __str__(self) -> str:
        return f"{self.all:.3f} s of CPU time a host, {self.here:.3f} s of it here"


def _played(made: Fleet, task: dict[str, Any]) -> None:
    told = made.play([{"name": "it", **task}], "--forks", "20")
    if told.status:
        raise RuntimeError(told.text or str(told.results))


def _spent(machines: Sequence[Scenario], work: Callable[[], None], count: int) -> Spent:
    def now() -> tuple[float, float]:
        return sum(os.times()[:4]), sum(_of_process_1(machine) for machine in machines)

    here, there = now()
    work()
    after, after_there = now()
    return Spent((after - here + after_there - there) / count, (after - here) / count)


def _of_process_1(machine: Scenario) -> float:
    """CPU time of the first process of a scenario, with all that it waited for."""
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    found = 0.0
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found += sum(int(field) for field in fields[11:15]) / TICKS
    return found


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[1:]] or list(SIZES)
    row = fleet(sizes)
    print(f"{row.what}: {row.measured}")
