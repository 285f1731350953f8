# SPDX-License-Identifier: Apache-2.0
"""`make bench`: start-up, parser, planner and apply, measured side by side in one run.

Prints ratios beside the bare numbers: a number alone says more of the machine than of the program.
"""

from __future__ import annotations

import compileall
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_apply
from emupmem.model import GIB, MIB, FirmwareMap, Kind, MapEntry, Request
from emupmem.planner import survey
from emupmem.planner.plan import offers, plan, rejected
from emupmem.planner.situation import NoPlan, Situation
from tests import PROJECT
from tests.bench import parser as bench_parser
from tests.fake import LOG, build


def seconds(what: Callable[[], object], times: int = 7) -> float:
    """The median of some runs, after one that does not count."""
    what()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def program(*argv: str) -> Callable[[], object]:
    """A Python program to its end."""
    return lambda: subprocess.run([sys.executable, *argv], stdout=subprocess.DEVNULL, check=True)


def start_up(folder: Path) -> None:
    """How long `suggest` takes beside a bare interpreter and beside `import typer`."""
    compileall.compile_dir(PROJECT / "emupmem", quiet=1)
    log = folder / "boot.log"
    log.write_text(LOG)
    bare = seconds(program("-c", "pass"))
    typer = seconds(program("-c", "import typer"))
    version = seconds(program("-m", "emupmem", "--version"))
    as_json = seconds(program("-m", "emupmem", "suggest", "--json", "--from", str(log)))
    people = seconds(program("-m", "emupmem", "suggest", "--from", str(log)))
    print("start-up, seconds (times `import typer`)")
    for name, value in (
        ("bare interpreter", bare),
        ("import typer", typer),
        ("emupmem --version", version),
        ("emupmem suggest --json", as_json),
        ("emupmem suggest", people),
    ):
        print(f"  {name:24} {value:7.3f}  ({value / typer:.1f})")


def many_ranges(count: int) -> Situation:
    """RAM in `count` pieces of 64 MiB with holes between: none has room for 1 GiB but the last."""
    entries = [
        MapEntry(4 * GIB + i * 128 * MIB, 4 * GIB + i * 128 * MIB + 64 * MIB, Kind.RAM) for i in range(count)
    ]
    top = entries[-1].end + GIB
    return Situation(FirmwareMap((*entries, MapEntry(top, top + 4 * GIB, Kind.RAM))))


def planner() -> None:
    """Growth of the planner with the number of ranges: found, and searched in vain."""
    print("planner, seconds: plan found, nothing fits, offers and reasons")
    for count in (1_000, 10_000, 100_000):
        situation = many_ranges(count)

        def in_vain(situation: Situation = situation) -> None:
            try:
                plan(situation, Request(64 * GIB))
            except NoPlan:
                return

        def words(situation: Situation = situation) -> None:
            offers(situation, Request())
            rejected(situation, Request(GIB), None)

        found = seconds(lambda s=situation: plan(s, Request(GIB)), 3)  # type: ignore[misc]
        print(f"  {count:7} ranges  {found:6.3f}  {seconds(in_vain, 3):6.3f}  {seconds(words, 3):6.3f}")


def apply(folder: Path) -> None:
    """Planning, editing and proving a change, without the generator."""
    machine = build(folder / "machine")
    found = survey.of_log(LOG.encode(), "log")
    taken = seconds(lambda: prepare_apply(machine, found, Request(GIB), Options()))
    print(f"apply without the generator: {taken:.3f} s")


def main() -> None:
    """Run all of it."""
    with tempfile.TemporaryDirectory() as name:
        start_up(Path(name))
        planner()
        apply(Path(name))
    bench_parser.main()


if __name__ == "__main__":
    main()
