# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.fuzz`: fuzz for some time, run an input again, or keep what was found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz import driver


def main() -> int:
    parse = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parse.add_argument("targets", nargs="*", metavar="TARGET", help="all of them, unless some are named")
    parse.add_argument("--minutes", type=float, default=2, help="in total, over all targets (2)")
    parse.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="run these inputs again")
    parse.add_argument("--keep", action="store_true", help="reduce what was found into tests/fixtures/fuzz")
    parse.add_argument("--list", action="store_true", help="name the targets")
    parse.add_argument("--child", help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.child:
        driver.child(given.child, round(given.minutes * 60))
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.texts import FOREIGN

    names = given.targets or list(TARGETS)
    if given.list:
        for target in TARGETS.values():
            print(f"{target.name:<10} {target.about}")
        return 0
    if given.replay:
        for file in given.replay:
            driver.replay(file.name.partition("-")[0], file.read_bytes())
            print(f"{file}: well")
        return 0
    if given.keep:
        if FOREIGN:
            parse.error("nothing is kept of what comes from EMUPMEM_CORPUS")
        for name in names:
            files, reached = driver.reduce(name)
            print(f"{name:<10} {files:>4} inputs reach {reached} pairs of lines", flush=True)
        return 0
    failed = False
    for report in driver.run(names, given.minutes * 60):
        print(report, flush=True)
        if report.finding is not None:
            failed = True
            print(f"{report.said}\nfound: {report.finding}", file=sys.stderr)
            print(
                f"again: {sys.executable} -m tests.fuzz --replay {report.finding}",
                file=sys.stderr,
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
