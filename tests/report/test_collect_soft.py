# SPDX-License-Identifier: Apache-2.0
"""What an archive has of soft reserved memory: enough for the same verdict elsewhere."""

from __future__ import annotations

import io

import pytest

from emupmem.device import at_boot, unit
from emupmem.model import DeviceKind
from emupmem.report import gather
from emupmem.report.archive import pack, unpack
from emupmem.report.collected import Collected
from emupmem.verifier.observe import observe
from tests.device.test_soft import BLOCKS, BUS, ITEM, MEMORY, kernel
from tests.fake import RELEASE, FakeMachine, put


def test_the_verdict_on_soft_reserved_memory_travels(
    here: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(here, "/proc/cmdline", f"ro memmap={ITEM} modprobe.blacklist=kmem\n")
    put(here, "/usr/local/bin/emupmem", "")
    put(here, unit.FILE, unit.unit_text([MEMORY], "/usr/local/bin/emupmem"))
    put(here, f"/lib/modules/{RELEASE}/modules.dep", "kernel/dax/kmem.ko:\nkernel/dax/hmem/dax_hmem.ko:\n")
    put(here, "/sys/devices/system/node/node1/meminfo", "Node 1 MemTotal:  262144 kB\n")
    put(here, "/sys/devices/virtual/memory_tiering/memory_tier22/nodelist", "1\n")
    put(here, "/dev/dax0.0", "")
    kernel(here, monkeypatch, "")
    monkeypatch.setattr(unit, "SECONDS", 0)
    assert at_boot.boot(here, [MEMORY], lambda line: None) == 0
    seen = observe(here, 0).soft
    assert [(s.kind, s.device is not None, len(s.blocks)) for s in seen] == [(DeviceKind.MEMORY, True, 2)]
    made = gather.gather_machine(here).archive
    assert observe(Collected(unpack(io.BytesIO(pack(made)), "a")), 0).soft == seen
    names = [n for n in made.members if BUS in n or BLOCKS in n]
    put(here, "/proc/cmdline", "ro quiet\n")
    assert not set(names) & set(gather.gather_machine(here).archive.members), (
        "of other memory nothing is taken"
    )
