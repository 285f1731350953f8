# SPDX-License-Identifier: Apache-2.0
"""Kernels start in a newer QEMU than this host may have, with the processor that it emulates for the guests here."""

from __future__ import annotations

import subprocess

import pytest

from emupmem.demo.guest import emulated
from emupmem.vm.arguments import parse_version
from tests.vm.kernel import boot_kernel
from tests.vm.tools import qemu_of


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(suite, marks=pytest.mark.vm(image=f"{suite} {firmware}", boots=1, seconds=10))
        for suite, firmware in (("bookworm", "bios"), ("trixie", "uefi"), ("forky", "bios"))
    ],
)
def test_the_qemu_of_debian_13(suite: str) -> None:
    words = qemu_of("trixie")
    version = parse_version(subprocess.check_output([*words, "--version"], text=True))
    assert version == (10, 0)
    # what is given last counts
    out = boot_kernel(suite, memory="1G", qemu_args=emulated(version), script="echo up", launcher=words)
    assert out == "up\n"
