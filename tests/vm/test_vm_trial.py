# SPDX-License-Identifier: Apache-2.0
"""Trial boots through a real GRUB: a good one, one that panics, one whose power is cut."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict

import pytest

from emupmem.model import GIB
from emupmem.report import archive as report_archive
from emupmem.report import collected
from tests.vm.image import ROOT_UUID, image
from tests.vm.machine import Machine
from tests.vm.test_vm import FEWER, done, said

BEGIN = (
    FEWER
    + """
set -eux
sha256sum /etc/default/grub > /root/before
emupmem apply --size 1G --trial --yes --json > /job/out/apply.json
sha256sum -c /root/before
emupmem verify --json > /job/out/verify.json && exit 9 || [ $? = 3 ]
emupmem confirm --yes && exit 9 || [ $? = 1 ]
"""
)

# The trial itself: it works, and then the power goes.
CUT = """
set -eux
grep memmap=1G!4G /proc/cmdline
echo 'NOW CUT' 'THE POWER'
sleep 1000
"""

# The machine came back by itself. The next trial is tampered with: its kernel panics.
PANICS = """
set -eux
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
emupmem verify --json > /job/out/cut.json && exit 9 || [ $? = 3 ]
emupmem abandon --yes
update-grub2 2> /dev/null
grep -i trial /boot/grub/grub.cfg && exit 9 || [ $? = 1 ]
emupmem apply --size 1G --trial --yes
sed -i 's/memmap=1G!4G$/& panic=1 rdinit=\\/nonexistent/' /boot/grub/grub.cfg
grep -c 'rdinit=/nonexistent' /boot/grub/grub.cfg
sync
"""

GOOD = """
set -eux
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
emupmem verify --json > /job/out/panic.json && exit 9 || [ $? = 3 ]
emupmem apply --size 1G --trial --yes
"""

CONFIRM = """
set -eux
grep memmap=1G!4G /proc/cmdline
emupmem verify --json > /job/out/trial.json
emupmem confirm --yes
[ ! -e /etc/grub.d/42_emupmem_trial ]
emupmem verify
"""

# Permanent. Taken back, and tried again by kexec: straight from here, without the firmware and GRUB.
LAST = """
set -eux
emupmem verify --json > /job/out/last.json
emupmem remove --yes
sha256sum -c /root/before
if grep -i trial /boot/grub/grub.cfg; then exit 8; fi
find /boot /etc/default /etc/grub.d -type f -exec sha256sum {} + > /root/disk
emupmem apply --size 2G --variable GRUB_CMDLINE_LINUX_DEFAULT --trial=kexec --yes
sleep 1000
"""

# In the trial by kexec: nothing on the disk has changed. It is kept, and taken back. Then all that hinders a trial,
# each for good until the next start; and the way to that is a plain reset.
BY_KEXEC = """
set -eux
. /job/warm
cat /proc/cmdline
sha256sum --quiet -c /root/disk
emupmem verify --json > /job/out/kexec.json
emupmem suggest > /job/out/bykexec 2>&1 || true
cat /proc/sys/kernel/bootloader_type >> /job/out/bykexec
emupmem collect /job/out/m.tar.gz
emupmem doctor --json > /job/out/doctor.json
emupmem abandon --yes 2> /job/out/abandon && exit 9 || [ $? = 1 ]
emupmem confirm --yes
grep 'GRUB_CMDLINE_LINUX_DEFAULT=.* memmap=2G!4G"' /etc/default/grub
emupmem remove --yes
refused() {
    emupmem apply --size 1G --yes "$1" 2>> /job/out/refused && exit 9 || [ $? = 1 ]
}
mv /usr/sbin/kexec /root/kexec
refused --trial=kexec
mv /root/kexec /usr/sbin/kexec
sysctl -w kernel.kexec_load_disabled=1
refused --trial=kexec
echo integrity > /sys/kernel/security/lockdown
refused --trial=kexec
mv /boot/grub/grubenv /root/grubenv
refused --trial
mv /root/grubenv /boot/grub/grubenv
mount --bind /boot/grub /boot/grub
mount -o remount,bind,ro /boot/grub
refused --trial
umount /boot/grub
sha256sum --quiet -c /root/disk
sync
echo b > /proc/sysrq-trigger
sleep 1000
"""

BACK = """
set -eux
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
sha256sum --quiet -c /root/disk
emupmem verify --json > /job/out/back.json
"""


def same_elsewhere(archive: bytes, there: list[dict[str, str]]) -> None:
    """Collected in the guest: the doctor says the same here, and what it must not tell is not in it."""
    unpacked = report_archive.unpack(io.BytesIO(archive), "m.tar.gz")
    here = [asdict(f) for f in collected.doctor_from(unpacked, "m.tar.gz")]
    assert here == json.loads(
        re.sub(ROOT_UUID, "0" * 8 + "-0000-0000-0000-" + "1".zfill(12), json.dumps(there))
    )
    text = b"".join(unpacked.members.values())
    assert [s for s in (ROOT_UUID, "QEMU Standard PC", "Hostname set to <guest>") if s.encode() in text] == []


@pytest.mark.vm(image="trixie uefi", boots=8, seconds=390)
def test_a_trial_that_fails_goes_back_by_itself_and_a_good_one_is_confirmed() -> None:
    with Machine(image("trixie", "uefi")) as guest:
        begun = done(guest.boot(BEGIN))
        assert said(begun, "apply.json")["reboot_required"] is True
        (check,) = said(begun, "verify.json")["checks"]
        assert (check["name"], check["status"]) == ("trial", "pending")

        cut = guest.boot(CUT, power_cut="NOW CUT THE POWER")
        assert cut.status is None

        # warm restarts in one run of the machine: after the panic it comes back without any help
        results = guest.boots([PANICS, GOOD, CONFIRM, LAST, BY_KEXEC, BACK], last=True)
        ends = [result.status for result in results]
        assert ends == [0, 0, 0, None, None, 0], "\n".join(r.output for r in results)
        last = results[-1]
        came_back = "the machine came back without memmap=1G!4G"
        assert came_back in said(last, "cut.json")["checks"][0]["found"]
        assert came_back in said(last, "panic.json")["checks"][0]["found"]
        tried = said(last, "trial.json")
        assert tried["ok"] is True
        assert "this boot is the trial" in tried["checks"][0]["found"]
        assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
        assert [c["status"] for c in said(last, "last.json")["checks"]] == ["ok"] * 7

        told, _, kind = last.files["bykexec"].decode().rstrip().rpartition("\n")
        assert (
            "! this kernel was started by kexec: the map is the one that the kernel before it handed on"
            in told
        )
        assert int(kind) >> 4 == 0xD  # Documentation/arch/x86/boot.rst, type_of_loader
        tried = said(last, "kexec.json")
        assert "this boot is the trial of memmap=2G!4G" in tried["checks"][0]["found"]
        assert "a restart goes back" in tried["checks"][0]["hint"]
        assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
        assert tried["devices"] == [{"dev": "/dev/pmem0", "start": 4 * GIB, "size": 2 * GIB}]
        assert b"nowhere on the disk: reboot goes back" in last.files["abandon"]
        same_elsewhere(last.files["m.tar.gz"], said(last, "doctor.json")["findings"])
        nothing = [c["found"] for c in said(last, "back.json")["checks"]]
        assert nothing[0] == "nothing is reserved"
        refused = last.files["refused"].decode()
        for words in (
            "kexec is not installed",
            "kexec is switched off until the next start",
            "the kernel is locked down (none [integrity] confidentiality)",
            "GRUB cannot clear its choice: there is no /boot/grub/grubenv",
            "mounted read-only",
        ):
            assert words in refused, refused
