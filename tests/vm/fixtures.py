# SPDX-License-Identifier: Apache-2.0
"""Print the fixtures again: `python -m tests.vm.fixtures [NAME…]` writes tests/fixtures/boot.

Every text is what a virtual machine said, byte by byte.  Names are directories such as
`6.1-bios-memmap`, or `decorated`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests import FIXTURES
from tests.vm.image import image, to_stderr
from tests.vm.kernel import boot_kernel
from tests.vm.machine import Machine

TARGET = FIXTURES / "boot"
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "7.2": "forky"}

# Each file is framed by a line `GS name`.
SCRIPT = r"""
show() { printf '\035%s\n' "$1"; }
show dmesg; dmesg
show cmdline; cat /proc/cmdline
show version; cat /proc/version
show iomem; cat /proc/iomem
show memmap
for n in $(ls /sys/firmware/memmap | sort -n); do
    cd /sys/firmware/memmap/$n && echo "$(cat start) $(cat end) $(cat type)"
done
show nodes
for file in /sys/devices/system/node/node*/meminfo; do [ ! -e $file ] || cat $file; done
show nd
for file in /sys/bus/nd/devices/*/resource /sys/bus/nd/devices/*/size \
    /sys/bus/nd/devices/*/align /sys/bus/nd/devices/*/mode /sys/bus/nd/devices/*/numa_node \
    /sys/bus/nd/devices/*/provider /sys/bus/nd/devices/*/devtype /sys/block/pmem*/size \
    /sys/block/pmem*/queue/dax /sys/block/pmem*/dev; do
    [ ! -e $file ] || echo "$file=$(cat $file)"
done
true
"""


@dataclass(frozen=True)
class Scenario:
    """One machine: command line, memory, nodes, firmware, and the kernels that boot it."""

    cmdline: str = ""
    memory: str = "6G"
    nodes: tuple[str, ...] = ()
    firmware: str = "bios"
    kernels: tuple[str, ...] = tuple(KERNELS)


SCENARIOS: Mapping[str, Scenario] = {
    "bios": Scenario(),
    "bios-memmap": Scenario("memmap=1G!4G"),
    "bios-two": Scenario("memmap=1G!4G,1G!5G"),
    "bios-numa": Scenario(memory="8G", nodes=("4G", "4G")),
    "uefi": Scenario(firmware="uefi"),
    "uefi-memmap": Scenario("memmap=1G!4G", firmware="uefi"),
    "source-example": Scenario("memmap=16G!4G", memory="20G"),
    # What goes wrong, on one kernel each.
    "bios-straddling": Scenario("memmap=1G!1536M", memory="2G", kernels=("6.12",)),
    "bios-nothing": Scenario("memmap=256M!8G", memory="3G", kernels=("6.12",)),
    "bios-misaligned": Scenario("memmap=255M!4G", kernels=("6.1",)),
    "bios-limit": Scenario("memmap=256MB!1G", memory="3G", kernels=("6.12",)),
    "bios-mem": Scenario("mem=2G", kernels=("7.2",)),
    # The kernel lands in the fifth, which KASLR does not see.
    "bios-five": Scenario(
        "memmap=2M!1870M memmap=2M!1880M memmap=2M!1890M memmap=2M!1900M memmap=1792M!64M",
        memory="2G",
        kernels=("6.12",),
    ),
}

# Heads are enough: the memory map comes first.
DECORATED = r"""
cd /job/out
head() { command head -n 60; }
dmesg | head >plain.log
dmesg -x | head >x.log
dmesg -T | head >ctime.log
dmesg -r | head >raw.log
dmesg -J | command head -n 400 >json.log
dmesg --color=always | head >color.log
dmesg --time-format iso | head >iso.log
dmesg -e | head >reltime.log
dmesg -d | head >delta.log
dmesg -t | head >notime.log
for form in short short-iso cat json with-unit; do
    journalctl -k -b --no-pager -o $form | head >journal-$form.log
done
journalctl -k -b --no-pager -o verbose | command head -n 1000 >journal-verbose.log
timeout 5 /usr/bin/head -n 60 /dev/kmsg >kmsg.log
true
"""


def print_scenario(name: str, kernel: str) -> None:
    """Boot one scenario on one kernel and write its files."""
    scenario = SCENARIOS[name]
    text = boot_kernel(
        KERNELS[kernel],
        scenario.cmdline,
        memory=scenario.memory,
        nodes=scenario.nodes,
        firmware=scenario.firmware,
        script=SCRIPT,
    )
    directory = TARGET / f"{kernel}-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    for part in text.split("\035")[1:]:
        file, _, content = part.partition("\n")
        (directory / file).write_text(content)


def print_decorated(suite: str) -> None:
    """Print the same log through every option of the tools of a whole guest."""
    with Machine(image(suite, words=to_stderr), source=None) as machine:
        result = machine.boot(DECORATED)
    if result.status != 0:
        raise RuntimeError(result.output)
    directory = TARGET / "decorated"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in result.files.items():
        (directory / f"{suite}-{name}").write_bytes(content)


def main(wanted: Sequence[str]) -> int:
    """Print all fixtures, or those named."""
    for name, scenario in SCENARIOS.items():
        for kernel in scenario.kernels:
            if not wanted or f"{kernel}-{name}" in wanted:
                to_stderr(f"{kernel}-{name}")
                print_scenario(name, kernel)
    if not wanted or "decorated" in wanted:
        for suite in ("bookworm", "forky"):
            to_stderr(f"decorated {suite}")
            print_decorated(suite)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
