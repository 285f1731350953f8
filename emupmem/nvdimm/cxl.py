# SPDX-License-Identifier: Apache-2.0
"""Persistent memory on CXL devices before a region was made of it: ndctl sees nothing then."""

from __future__ import annotations

import re

from emupmem.system.machine import Machine

BUS = "/sys/bus/cxl/devices"


def region_command(machine: Machine) -> str:
    """What makes a region of the first CXL device with persistent capacity, empty where none has any.

    Also empty where a region of that kind is there already (Documentation/ABI/testing/sysfs-bus-cxl).
    """
    names = machine.names(BUS)
    if any(re.fullmatch(r"pmem_region\d+", n) for n in names):
        return ""
    memory = next((n for n in names if re.fullmatch(r"mem\d+", n) and _size(machine, n)), "")
    if not memory:
        return ""
    roots = [n for n in names if re.fullmatch(r"decoder0\.\d+", n)]
    root = next((n for n in roots if machine.peek(f"{BUS}/{n}/cap_pmem") == "1"), "decoder0.0")
    return f"sudo cxl create-region -t pmem -m -d {root} {memory}"


def _size(machine: Machine, name: str) -> int:
    text = machine.peek(f"{BUS}/{name}/pmem/size")
    return int(text, 0) if re.fullmatch(r"0x[0-9a-f]+|[1-9]\d*", text) else 0
