# SPDX-License-Identifier: Apache-2.0
"""`emupmem bench`: ns per load of memory. No logic of its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from emupmem.cli.options import Json
from emupmem.cli.output import Exit, say, tell
from emupmem.cli.session import Session
from emupmem.device import latency
from emupmem.system import machine as system_machine
from emupmem.system.latency import MOST, STRIDE
from emupmem.units import human


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="node1, /dev/dax0.0 or a file on a DAX mount (default: every NUMA node with memory).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how many ns a load takes: local memory beside nodes, DAX devices and files on a DAX mount.

    Each load waits for the one before it, and none finds its line in a cache. Devices and files are only read.
    """
    session = Session({}, as_json)
    with session.errors():
        found = latency.measure(system_machine.Machine(), targets or [])
        session.result |= {
            "processor": found.processor,
            "node": found.node,
            "results": [asdict(one) for one in found.results],
            "notes": list(found.notes),
        }
        if session.as_json:
            session.finish(Exit.OK)
        width = max(len(one.target) for one in found.results)
        first = found.results[0].target
        for one in found.results:
            more = f", {one.times:.2f} times {first}" if one.target != first else ""
            between = f"half of the windows {one.low:.0f} to {one.high:.0f}"
            tell(f"{one.target:{width}}  {one.ns:6.1f} ns a load ({between}){more}")
        tell(
            f"\nBy processor {found.processor}: dependent loads in random order, one in {STRIDE} bytes, up to "
            f"{human(MOST)} of each, flushed from the caches before."
        )
        for note in found.notes:
            say(f"! {note}")
