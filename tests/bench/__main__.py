# SPDX-License-Identifier: Apache-2.0
"""`make bench`: start-up, parser, planner, apply, and in a guest DAX, save and restore: one table of all figures.

Prints ratios beside the bare numbers: a number alone says more of the machine than of the program.
`python -m tests.bench --no-guest` leaves the guest away.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_apply
from emupmem.model import GIB, MIB, FirmwareMap, Kind, MapEntry, Request
from emupmem.planner import survey
from emupmem.planner.plan import offers, plan, rejected
from emupmem.planner.situation import NoPlan, Situation
from tests.bench import fleet, guest, startup
from tests.bench import parser as bench_parser
from tests.bench.table import APPLY, PLANNING, Row, table
from tests.fake import LOG, build


def seconds(what: Callable[[], object], times: int = 7) -> float:
    """CPU time: the median of some runs, after one that does not count."""
    what()
    taken = []
    for _ in range(times):
        start = sum(os.times()[:4])  # with that of programs: sh judges edits
        what()
        taken.append(sum(os.times()[:4]) - start)
    return statistics.median(taken)


def afresh(what: Callable[[], object], times: int = 7) -> float:
    """CPU time of the first call in a process, its programs included: the median of some processes."""
    taken = []
    for _ in range(times):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                what()
                status = 0
            finally:
                os._exit(status)
        _, status, used = os.wait4(child, 0)
        if status:
            raise RuntimeError("what is measured failed (its words are above)")
        taken.append(used.ru_utime + used.ru_stime)
    return statistics.median(taken)


def many_ranges(count: int) -> Situation:
    """RAM in `count` pieces of 64 MiB with holes between: none has room for 1 GiB but the last."""
    entries = [
        MapEntry(4 * GIB + i * 128 * MIB, 4 * GIB + i * 128 * MIB + 64 * MIB, Kind.RAM) for i in range(count)
    ]
    top = entries[-1].end + GIB
    return Situation(FirmwareMap((*entries, MapEntry(top, top + 4 * GIB, Kind.RAM))))


def planner() -> Row:
    """Growth of the planner with the number of ranges: found, and searched in vain."""
    print("planner, seconds: plan found, nothing fits, offers and reasons")
    found = in_vain = 0.0
    for count in (1_000, 10_000, 100_000):
        situation = many_ranges(count)

        def search(situation: Situation = situation) -> None:
            try:
                plan(situation, Request(64 * GIB))
            except NoPlan:
                return

        def words(situation: Situation = situation) -> None:
            offers(situation, Request())
            rejected(situation, Request(GIB), None)

        found = seconds(lambda s=situation: plan(s, Request(GIB)), 3)  # type: ignore[misc]
        in_vain = seconds(search, 3)
        print(f"  {count:7} ranges  {found:6.3f}  {in_vain:6.3f}  {seconds(words, 3):6.3f}")
    return Row(
        PLANNING,
        f"{found:.1f} s of CPU time, most of it the proof; {in_vain:.1f} s to find that nothing fits",
    )


def apply(folder: Path) -> Row:
    """Planning, editing and proving a change, without the generator."""
    machine = build(folder / "machine")
    found = survey.of_log(LOG.encode(), "log")
    taken = afresh(lambda: prepare_apply(machine, found, Request(GIB), Options()))
    return Row(APPLY, f"{taken:.2f} s of CPU time in a process that did nothing before")


def main(words: Sequence[str]) -> int:
    """Run all of it."""
    with tempfile.TemporaryDirectory() as name:
        rows = [*startup.start_up(), planner(), apply(Path(name)), bench_parser.reading()]
    rows.append(fleet.fleet())
    if "--no-guest" not in words:
        rows += guest.inside("bookworm")
    print(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
