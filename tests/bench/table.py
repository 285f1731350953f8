# SPDX-License-Identifier: Apache-2.0
"""One table of all that was measured, in the form that the manual has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

READING = "reading a 300 MB log with one boot in the middle"
PLANNING = "planning on a map with 100,000 ranges"
APPLY = "`apply` without the generator"
SUGGEST = "start of `emupmem suggest --from LOG`"
USAGE = "start of `emupmem --help`"
SAVING = "in a Debian 12 guest: saving a 512 MiB device with 200 MB in use, bringing it back"
COPYING = "there: writing and reading 256 MiB, MiB/s"
FAULTS = "there: page faults for touching 256 MiB through a mapping"
FLEET = "a run of the Ansible module `reservation` that changes nothing, per host"
MEASURED = (READING, PLANNING, APPLY, SUGGEST, USAGE, FLEET, SAVING, COPYING, FAULTS)
"""The rows of the manual that `make bench` prints, by their beginnings; the others say what made them."""


@dataclass(frozen=True)
class Row:
    """What was measured, and the figures."""

    what: str
    measured: str


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [f"| {row.what} | {row.measured} |" for row in rows]
    return "\n".join(["| What | Measured |", "| --- | --- |", *lines])
