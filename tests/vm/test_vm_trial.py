# SPDX-License-Identifier: Apache-2.0
"""Trial boots through a real GRUB: a good one, one that panics, one whose power is cut; two of them by Ansible."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import GIB
from emupmem.report import archive as report_archive
from emupmem.report import collected
from tests.fleet import sshd
from tests.fleet.control import Control, Told
from tests.fleet.sshd import ASK, START, Outside, Reached
from tests.vm.image import ROOT_UUID, image
from tests.vm.machine import Machine
from tests.vm.test_vm import FEWER, INSTALL, WAIT, done, said

BEGIN = (
    FEWER
    + """
set -eux
. /job/warm
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

# The machine came back by itself. The next trial is Ansible's, which restarts the machine; it is tampered with when
# the machine goes down: its kernel panics.
PANICS = f"""
set -eux
. /job/warm
{INSTALL}{START}{ASK}
"""
PANICS += """
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
emupmem verify --json > /job/out/cut.json && exit 9 || [ $? = 3 ]
emupmem abandon --yes
update-grub2 2> /dev/null
grep -i trial /boot/grub/grub.cfg && exit 9 || [ $? = 1 ]
cat > /run/systemd/system/tamper.service <<'END'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
ExecStop=sed -i 's|memmap=1G!4G$|& panic=1 rdinit=/nonexistent|' /boot/grub/grub.cfg
ExecStop=sync
END
systemctl start tamper.service
ask bad
"""

# It came back again: the role has seen that, and taken the trial away. The next one is good.
GOOD = f"""
set -eux
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
{ASK}answered bad
grep -c 'rdinit=/nonexistent' /boot/grub/grub.cfg && exit 9 || [ $? = 1 ]
ask good
"""

CONFIRM = f"""
set -eux
grep memmap=1G!4G /proc/cmdline
{ASK}answered good
[ ! -e /etc/grub.d/42_emupmem_trial ]
stat -c '%U:%G' /mnt/pmem0 > /job/out/owner
emupmem verify
"""

# Permanent. Taken back, and tried again by kexec: straight from here, without the firmware and GRUB.
LAST = f"""
set -eux
. /job/warm
{WAIT}
"""
LAST += """
emupmem verify --json > /job/out/last.json
emupmem remove --yes
[ ! -e /etc/systemd/system/emupmem.service ]
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


def failed(told: Told, came_back: str) -> None:
    """The role found the machine without what was tried, took the trial away, and says so."""
    assert told.status == 2, told
    assert told.of("Restart the host")["guest"]["rebooted"] is True
    seen = told.of("Look at every step")["guest"]
    assert seen["trial"] == "over", seen
    assert came_back in seen["checks"][0]["found"]
    gone = told.of("Take a trial away that did not come")["guest"]
    assert (gone["changed"], gone["trial"]) == (True, "over"), gone
    end = told.of("Stop where the host came back without it")["guest"]
    assert end["_kind"] == "failed"
    assert "came back without memmap=1G!4G" in end["msg"]
    assert "The trial was taken away, the configuration is the old one." in end["msg"]


def went_well(told: Told) -> None:
    """The role restarted the machine, saw the trial, made it permanent, and mounted it."""
    assert told.status == 0, told
    assert told.of("Restart the host")["guest"]["rebooted"] is True
    tried = told.of("Look at every step")["guest"]
    assert (tried["ok"], tried["trial"]) == (True, "running"), tried
    assert "this boot is the trial" in tried["checks"][0]["found"]
    assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
    assert told.of("Make the trial permanent")["guest"]["changed"] is True
    assert told.of("Prove it")["guest"]["ok"] is True
    mounted = told.of("Mount it at every boot")["guest"]
    assert (mounted["changed"], mounted["mounts"][0]["dir"]) == (True, "/mnt/pmem0")
    assert told.of("Mount it now")["guest"]["changed"] is True


@pytest.mark.vm(image="trixie uefi", boots=8, seconds=520)
def test_a_trial_that_fails_goes_back_by_itself_and_a_good_one_is_confirmed(tmp_path: Path) -> None:
    if why := sshd.lacking():
        pytest.skip(why)
    made = image("trixie", "uefi")
    reached, plays = Reached(made, tmp_path), dict[str, Told]()
    control = Control(tmp_path / "control", reached.inventory("guest"))

    def role(name: str) -> None:
        wanted: dict[str, Any] = {"emupmem_size": "1G", "emupmem_reboot_timeout": 3000}
        wanted |= {"emupmem_mount": ["/mnt/pmem0"], "emupmem_owner": "dev"}
        plays[name] = control.play([], roles=[{"role": "emupmem.emupmem.emupmem", "vars": wanted}])

    outside = Outside(reached, {"bad": lambda: role("bad"), "good": lambda: role("good")})
    with Machine(made, qemu_args=reached.arguments) as guest:
        begun = done(guest.boot(BEGIN))
        assert said(begun, "apply.json")["reboot_required"] is True
        (check,) = said(begun, "verify.json")["checks"]
        assert (check["name"], check["status"]) == ("trial", "pending")

        cut = guest.boot(CUT, power_cut="NOW CUT THE POWER")
        assert cut.status is None

        # warm restarts in one run of the machine: after the panic it comes back without any help
        scripts = [PANICS, GOOD, CONFIRM, LAST, BY_KEXEC, BACK]
        results = guest.boots(scripts, reached.files, live=outside, last=True)
        ends = [result.status for result in results]
        assert ends == [None, None, 0, None, None, 0], "\n".join(r.output for r in results)
        last = results[-1]
        came_back = "the machine came back without memmap=1G!4G"
        assert came_back in said(last, "cut.json")["checks"][0]["found"]
        assert "Kernel panic" in last.console
        failed(plays["bad"], came_back)
        went_well(plays["good"])
        assert last.files["owner"] == b"dev:dev\n"
        assert [c["status"] for c in said(last, "last.json")["checks"]] == ["ok"] * 12

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
