"""Trial boots through a real GRUB: a good one, one that panics, one whose power is cut."""

from __future__ import annotations

import pytest

from emupmem.model import GIB
from tests.test_vm import FEWER, done, said
from tests.vm.image import image
from tests.vm.machine import Machine

pytestmark = pytest.mark.vm

BEGIN = (
    FEWER
    + """
set -eux
sha256sum /etc/default/grub > /root/before
cp /boot/grub/grub.cfg /root/grub.cfg.before
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
! grep memmap= /proc/cmdline
emupmem verify --json > /job/out/cut.json && exit 9 || [ $? = 3 ]
emupmem abandon --yes
update-grub2 2> /dev/null
! grep -i trial /boot/grub/grub.cfg
emupmem apply --size 1G --trial --yes
sed -i 's/memmap=1G!4G$/& panic=1 rdinit=\\/nonexistent/' /boot/grub/grub.cfg
grep -c 'rdinit=/nonexistent' /boot/grub/grub.cfg
sync
"""

GOOD = """
set -eux
! grep memmap= /proc/cmdline
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
cmp /boot/grub/grub.cfg /root/grub.cfg.before
find /boot /etc/default /etc/grub.d -type f -exec sha256sum {} + > /root/disk
emupmem apply --size 2G --trial=kexec --dry-run
KEXEC
"""
KEXEC = """
emupmem apply --size 2G --variable GRUB_CMDLINE_LINUX_DEFAULT --trial=kexec --yes > /root/kexec
sleep 1000
"""

# The trial by kexec: good, nothing on the disk has changed, and a reset leads back.
BY_KEXEC = """
set -eux
cat /proc/cmdline /root/kexec
sha256sum --quiet -c /root/disk
emupmem verify --json > /job/out/kexec.json
emupmem abandon --yes 2> /job/out/abandon && exit 9 || [ $? = 1 ]
emupmem doctor --json > /job/out/doctor.json
sync
echo b > /proc/sysrq-trigger
sleep 1000
"""

BACK = """
set -eux
! grep memmap= /proc/cmdline
sha256sum --quiet -c /root/disk
emupmem verify --json > /job/out/back.json
KEXEC
"""

# Once more, and kept. Then all that hinders a kexec, each for good until the next start.
KEPT = """
set -eux
emupmem confirm --yes
grep 'GRUB_CMDLINE_LINUX_DEFAULT=.* memmap=2G!4G"' /etc/default/grub
emupmem verify
emupmem remove --yes
sha256sum -c /root/before
refused() {
    emupmem apply --size 1G --trial=kexec --yes 2>> /job/out/refused && exit 9 || [ $? = 1 ]
}
mv /usr/sbin/kexec /root/kexec
refused
mv /root/kexec /usr/sbin/kexec
sysctl -w kernel.kexec_load_disabled=1
refused
echo integrity > /sys/kernel/security/lockdown
refused
# and what hinders GRUB
grubenv() { emupmem apply --size 1G --trial --yes 2>> /job/out/grubenv && exit 9 || [ $? = 1 ]; }
mv /boot/grub/grubenv /root/grubenv
grubenv
[ ! -e /boot/grub/grubenv ]
mv /root/grubenv /boot/grub/grubenv
mount --bind /boot/grub /boot/grub
mount -o remount,bind,ro /boot/grub
grubenv
umount /boot/grub
sha256sum --quiet -c /root/disk
"""


@pytest.mark.vm(boots=8)
def test_a_trial_that_fails_goes_back_by_itself_and_a_good_one_is_confirmed() -> None:
    with Machine(image("trixie", "uefi")) as guest:
        begun = done(guest.boot(BEGIN))
        assert said(begun, "apply.json")["reboot_required"] is True
        (check,) = said(begun, "verify.json")["checks"]
        assert (check["name"], check["status"]) == ("trial", "pending")

        cut = guest.boot(CUT, power_cut="NOW CUT THE POWER")
        assert cut.status is None

        # warm restarts in one run of the machine: after the panic it comes back without any help
        scripts = [PANICS, GOOD, CONFIRM, LAST, BY_KEXEC, BACK, KEPT]
        results = guest.boots([s.replace("KEXEC\n", KEXEC) for s in scripts])
        ends = [result.status for result in results]
        assert ends == [0, 0, 0, None, None, None, 0], "\n".join(r.output for r in results)
        last = results[-1]
        came_back = "the machine came back without memmap=1G!4G"
        assert came_back in said(last, "cut.json")["checks"][0]["found"]
        assert came_back in said(last, "panic.json")["checks"][0]["found"]
        tried = said(last, "trial.json")
        assert tried["ok"] is True
        assert "this boot is the trial" in tried["checks"][0]["found"]
        assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
        assert [c["status"] for c in said(last, "last.json")["checks"]] == ["ok"] * 7

        tried = said(last, "kexec.json")
        assert "this boot is the trial of memmap=2G!4G" in tried["checks"][0]["found"]
        assert "a restart goes back" in tried["checks"][0]["hint"]
        assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
        assert tried["devices"] == [{"dev": "/dev/pmem0", "start": 4 * GIB, "size": 2 * GIB}]
        assert b"nowhere on the disk: reboot goes back" in last.files["abandon"]
        nothing = [c["found"] for c in said(last, "back.json")["checks"]]
        assert nothing[0] == "nothing is reserved"
        refused = last.files["refused"].decode()
        assert [w in refused for w in ("not installed", "switched off", "locked down")] == [True] * 3, refused
        grubenv = last.files["grubenv"].decode()
        assert "there is no /boot/grub/grubenv" in grubenv
        assert "mounted read-only" in grubenv
