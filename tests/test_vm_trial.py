"""Trial boots through a real GRUB: a good one, one that panics, one whose power is cut."""

from __future__ import annotations

import pytest

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

LAST = """
set -eux
emupmem verify --json > /job/out/last.json
emupmem remove --yes
sha256sum -c /root/before
"""


def test_a_trial_that_fails_goes_back_by_itself_and_a_good_one_is_confirmed() -> None:
    with Machine(image("trixie", "uefi")) as guest:
        begun = done(guest.boot(BEGIN))
        assert said(begun, "apply.json")["reboot_required"] is True
        (check,) = said(begun, "verify.json")["checks"]
        assert (check["name"], check["status"]) == ("trial", "pending")

        cut = guest.boot(CUT, power_cut="NOW CUT THE POWER")
        assert cut.status is None

        # warm restarts in one run of the machine: after the panic it comes back without any help
        results = guest.boots([PANICS, GOOD, CONFIRM, LAST])
        for result in results:
            done(result)
        last = results[-1]
        came_back = "the machine came back without memmap=1G!4G"
        assert came_back in said(last, "cut.json")["checks"][0]["found"]
        assert came_back in said(last, "panic.json")["checks"][0]["found"]
        tried = said(last, "trial.json")
        assert tried["ok"] is True
        assert "this boot is the trial" in tried["checks"][0]["found"]
        assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
        assert [c["status"] for c in said(last, "last.json")["checks"]] == ["ok"] * 7
