# SPDX-License-Identifier: Apache-2.0
"""`emupmem demo`: the whole job in a throw-away virtual machine. No logic of its own."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from emupmem.cli.output import Exit, say
from emupmem.cli.progress import shown_waiting
from emupmem.cli.session import root_machine
from emupmem.demo import disk, recipe
from emupmem.demo.guest import DemoGuest

CACHE = Path("/var/cache/emupmem")


def demo(
    kvm: Annotated[
        bool, typer.Option("--kvm", help="Use KVM: some times as fast, where /dev/kvm works.")
    ] = False,
    cache: Annotated[
        Path, typer.Option("--cache", metavar="DIR", help="Where the guest's disk is kept for the next time.")
    ] = CACHE,
) -> None:
    """Show the whole job in a throw-away virtual machine: suggest, apply, reboot, verify, mount, remove.

    This machine's boot configuration and memory stay as they are. It takes some minutes.
    """
    machine = root_machine("this makes the disk of a virtual machine")
    disk.require_programs(machine)
    start = time.monotonic()
    with shown_waiting():
        made = disk.demo_disk(machine, cache, say)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as name:
        work = Path(name)
        own = work / "disk.raw"
        disk.copy_disk(machine, made, own)
        for number, commands in enumerate(recipe.BOOTS, 1):
            began = time.monotonic()
            say(f"--- boot {number} of {len(recipe.BOOTS)}: firmware, GRUB, Linux")
            status = DemoGuest(own, disk.job_disk(machine, work, recipe.boot_script(commands)), kvm).boot(
                _live
            )
            say(f"--- up, done and off in {time.monotonic() - began:.0f} s")
            if status != 0:
                say(f"NOT as planned: the last command failed with status {status}")
                raise typer.Exit(Exit.ERROR)
    say(f"All as planned, {time.monotonic() - start:.0f} s in all.")


def _live(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
