# SPDX-License-Identifier: Apache-2.0
"""What is missing is installed in each distribution's own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.boot import trial
from emupmem.boot.grub import environment
from emupmem.model import EmupmemError
from emupmem.system.distribution import install_hint
from tests.fake import FakeMachine, put


@pytest.mark.parametrize(
    ("release", "program", "hint"),
    [
        (None, "kexec", "apt-get install kexec-tools"),
        ("ID=debian\n", "systemd-stub", "apt-get install systemd-boot-efi"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "ndctl", "apt-get install ndctl"),
        ("ID=fedora\n", "grub-editenv", "dnf install grub2-tools-minimal"),
        ('ID="almalinux"\nID_LIKE="rhel centos fedora"\n', "sbsign", "dnf install sbsigntools"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "mkfs.xfs", "zypper install xfsprogs"),
        ("ID=opensuse-tumbleweed\nID_LIKE=suse\n", "ukify", "install it: Debian's package is systemd-ukify"),
        ("ID=cachyos\nID_LIKE=arch\n", "ukify", "pacman -S systemd-ukify"),
        ("ID=alpine\n", "ndctl", "install it: Debian's package is ndctl"),
        ("ID=debian\n", "mount", ""),
    ],
)
def test_each_says_it_in_its_own_words(release: str | None, program: str, hint: str, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    if release is not None:
        put(machine, "/etc/os-release", release)
    assert install_hint(machine, program) == hint


def test_fedora_is_not_sent_to_apt(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    put(machine, "/etc/os-release", "ID=fedora\n")
    with pytest.raises(EmupmemError, match="grub-editenv is not installed") as wrong:
        environment.set_grubenv(machine, "next_entry", "x")
    assert wrong.value.hint == "dnf install grub2-tools-minimal"
    with pytest.raises(EmupmemError, match="kexec is not installed") as wrong:
        trial.kexec(machine, [], "")
    assert wrong.value.hint == "dnf install kexec-tools, or --trial without kexec"
