# SPDX-License-Identifier: Apache-2.0
"""What the product promises, on real kernels with a real GRUB: every reboot here is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import GIB, MIB
from tests.fleet import sshd
from tests.fleet.control import Control, Told
from tests.fleet.sshd import ASK, START, Outside, Reached
from tests.vm import package
from tests.vm.image import SPARE, image
from tests.vm.machine import Content, JobResult, Machine


def done(result: JobResult) -> JobResult:
    """The result of a script that must have come to its end."""
    assert result.status == 0, result.output
    return result


def said(result: JobResult, name: str) -> Any:
    """An object that the script kept in /job/out."""
    return json.loads(result.files[name])


# At boot the job disk is not there: emupmem must be on the disk, as after `make install`.
INSTALL = """
site=$(echo /opt/emupmem/lib/python3*/site-packages)
cp -r /job/src/emupmem $site/
mkdir -p /var/cache/emupmem-pyc$site
cp -r /job/pyc/emupmem /var/cache/emupmem-pyc$site/
"""

# What the package's set-up would compile in half a minute is there already: in one suite only.
COMPILED = f"""
mkdir -p /{package.PLACE}
cp -r /job/compiled/. /{package.PLACE}/
"""

# Where the package has it: Debian's own way, without a network. What else calls itself so goes away first.
PACKAGED = """
rm -r /usr/local/bin/emupmem /opt/emupmem
COMPILED
apt-get install -y /job/emupmem.deb
dpkg -L emupmem > /root/installed
"""

# Another version meanwhile: the device stays mounted, and the unit is the same.
UPGRADE = """
apt-get install -y /job/emupmem-newer.deb
dpkg-query -W emupmem > /run/said
grep newer /run/said
/usr/bin/emupmem verify
systemctl restart emupmem.service
grep -E ' /mnt/pmem0 .*dax=always' /proc/mounts
"""

# What was installed is gone, and nothing of it was left anywhere.
PURGED = """
apt-get purge -y emupmem
for file in $(cat /root/installed); do [ -d "$file" ] || [ ! -e "$file" ]; done
[ ! -e /usr/lib/python3/dist-packages/emupmem ]
find / -xdev -name '*emupmem*' ! -path '/var/backups/*' ! -path '/var/lib/dpkg/*' ! -path '/var/lib/apt/*' \
    ! -path '/var/log/*' ! -path '*/emupmem-job*' ! -path '*/emupmem-pyc*' > /job/out/left
"""

# Once with the reservation still there, once after it was taken back.
REMOVED_TOO_EARLY = """
apt-get remove -y emupmem > /job/out/removed 2>&1
grep 'memmap=' /etc/default/grub
COMPILED
apt-get install -y /job/emupmem.deb
"""

# grub-probe, which GRUB's scripts ask the same again and again, answers from memory within a boot.
PROBE = """
if [ ! -e /usr/sbin/grub-probe.real ]; then
    mv /usr/sbin/grub-probe /usr/sbin/grub-probe.real
    cat > /usr/sbin/grub-probe <<'END'
#!/bin/bash
known=/run/grub-probe/${*//\\//_}
[ -d /run/grub-probe ] || mkdir /run/grub-probe
[ -e "$known" ] || { /usr/sbin/grub-probe.real "$@" > "$known.new" && mv "$known.new" "$known"; } || exit $?
printf '%s' "$(< "$known")"
[ ! -s "$known" ] || echo
END
    chmod +x /usr/sbin/grub-probe
fi
"""

# Of GRUB's generator scripts only those that a guest needs, where time counts more than what is usual.
FEWER = (
    PROBE
    + """
chmod -x /etc/grub.d/20_linux_xen /etc/grub.d/30_* 2>/dev/null || true
"""
)

# The unit at boot has done its work, or has failed.
WAIT = """
while [ "$(systemctl show -P ActiveState emupmem.service)" = activating ]; do sleep 4; done
journalctl -b -u emupmem.service --no-pager -o cat > /job/out/journal
"""

# What a program does: map with MAP_SYNC, write every page, count the faults.
PROGRAM = """
import ctypes, mmap, os, resource
fd = os.open("/mnt/pmem0/data", os.O_RDWR | os.O_CREAT)
os.posix_fallocate(fd, 0, 8 << 20)
m = mmap.mmap(fd, 8 << 20, flags=0x03 | 0x80000)
os.close(fd)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for at in range(0, 8 << 20, 4096):
    m[at] = 1
print("FAULTS", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Calls by a script are forked from one process that has imported everything: see tests/vm/warm.py.
WARM = """
. /job/warm
"""

# How a script begins that takes little time, and stops at the first error.
READY = INSTALL + FEWER + "\nset -eux\n" + WARM

FIRST = """
set -eux
INSTALL
WARM
PROBE
sha256sum /etc/default/grub > /root/before
cp -p /boot/grub/grub.cfg /root/grub.cfg.before
emupmem_as dev suggest --size SIZE COUNT --json > /job/out/user.json
emupmem suggest --size SIZE COUNT --json > /job/out/suggest.json
emupmem apply --size SIZE COUNT --check && exit 9 || [ $? = 3 ]
sha256sum -c /root/before
PRESENT
emupmem apply --size SIZE COUNT --mount /mnt/pmem0 --owner dev --fs FS --check
systemd-analyze verify --man=no /etc/systemd/system/emupmem.service > /job/out/analyze 2>&1
emupmem verify --json > /job/out/pending.json && exit 9 || [ $? = 3 ]
cp /etc/default/grub /boot/grub/grub.cfg /job/out/
RESTART
"""

SECOND = """
set -eux
WARM
WAIT
RESTARTED
cat /proc/cmdline
# without another command there is a folder that the user can map
grep -E ' /mnt/pmem0 .*dax=always' /proc/mounts
stat -c '%U:%G %a' /mnt/pmem0 > /job/out/owner
runuser -u dev -- python3 -c "$(cat /job/program.py)" > /job/out/faults
emupmem verify --json > /job/out/verify.json
dmesg > /job/out/dmesg
emupmem_as dev verify --json > /job/out/user.json
emupmem_as dev suggest --size SIZE COUNT --json > /job/out/suggest.json
emupmem apply --size SIZE COUNT --check
UPGRADE
emupmem umount /mnt/pmem0

# the other file system serves on this kernel as well
emupmem mount /dev/pmem0 /mnt/pmem0 --fs OTHER --force --json > /job/out/other.json
emupmem umount /mnt/pmem0

# a driver that is not loaded is named, and verify loads nothing by itself
modprobe -r nd_pmem
emupmem verify --wait 0 > /job/out/unloaded && exit 9 || [ $? = 3 ]
modprobe nd_pmem

EARLY
ABSENT
sha256sum -c /root/before
cmp /boot/grub/grub.cfg /root/grub.cfg.before
[ ! -e /etc/systemd/system/emupmem.service ]
emupmem verify > /job/out/pending && exit 9 || [ $? = 3 ]
PURGED
"""

# Who does it: the program as people call it, or Ansible from outside, which also restarts the machine.
BY_HAND = {
    "PRESENT": "emupmem apply --size SIZE COUNT --mount /mnt/pmem0 --owner dev --fs FS --yes --json"
    " > /job/out/apply.json",
    "RESTARTED": "",
    "RESTART": "",
    "ABSENT": "emupmem remove --yes",
}
BY_ANSIBLE = {
    "PRESENT": f"{START}{ASK}ask present",
    "RESTARTED": f"{ASK}answered restart",
    "RESTART": "ask restart",
    "ABSENT": "ask absent",
}

THIRD = """
set -eux
. /job/warm
emupmem verify --require && exit 9 || [ $? = 3 ]
emupmem verify --json > /job/out/verify.json
[ ! -e /dev/pmem0 ]
"""


def part_of(results: list[JobResult], number: int, name: str) -> JobResult:
    """One of some boots, with those files of all that are in its own folder."""
    files = {n.removeprefix(f"{name}/"): c for n, c in results[-1].files.items() if n.startswith(f"{name}/")}
    return replace(results[number], files=files)


def ansible_steps(
    reached: Reached, told: dict[str, dict[str, Any]], size: str, count: int, fs: str
) -> dict[str, Callable[[], None]]:
    """What scripts ask for, by name; what the modules say of it comes into `told`."""
    control = Control(reached.folder / "control", reached.inventory("guest"))

    def play(**tasks: dict[str, Any]) -> None:
        names = {"present": "emupmem.emupmem.reservation", "absent": "emupmem.emupmem.reservation"}
        names |= {"verify": "emupmem.emupmem.verify", "restart": "ansible.builtin.reboot"}
        played: Told = control.play([{"name": n, names[n]: options} for n, options in tasks.items()])
        assert played.status == 0, json.dumps(list(played.results.values()), default=str)
        told.update({name: played.of(name)["guest"] for name in tasks})

    wanted = {"size": size, "count": count, "mount": ["/mnt/pmem0"], "owner": "dev", "fs": fs}
    return {
        "present": lambda: play(present=wanted),
        "restart": lambda: play(restart={"reboot_timeout": 3000}, verify={}),
        "absent": lambda: play(absent={"state": "absent"}),
    }


@pytest.mark.parametrize(
    ("suite", "firmware", "memory", "size", "count", "fs", "memmap", "words"),
    [
        # the example of every guide to emulated persistent memory, to the byte
        pytest.param(
            *("bookworm", "bios", "20G", "16G", 1, "ext4", "memmap=16G!4G", "persistent (type 12)"),
            marks=pytest.mark.vm(image="bookworm bios", boots=3, seconds=160),
        ),
        pytest.param(
            *("trixie", "uefi", "6G", "1G", 2, "xfs", "memmap=1G!4G,1G!5G", "persistent (type 12)"),
            marks=pytest.mark.vm(image="trixie uefi", boots=2, seconds=240),
        ),
        pytest.param(
            *("forky", "bios", "6G", "1G", 1, "ext4", "memmap=1G!4G", "persistent RAM (type 12)"),
            marks=pytest.mark.vm(image="forky bios", boots=2, seconds=320),
        ),
    ],
)
def test_suggest_apply_reboot_verify_mount_remove(
    suite: str,
    firmware: str,
    memory: str,
    size: str,
    count: int,
    fs: str,
    memmap: str,
    words: str,
    tmp_path: Path,
) -> None:
    """Debian 13 and testing with the package, which is upgraded in the one, and removed and purged in both.

    Debian testing is told and restarted by Ansible, as Debian 13 is in test_vm_trial.py.
    """
    other = {"ext4": "xfs", "xfs": "ext4"}[fs]
    packaged = suite != "bookworm"  # whose libraries are too old for the package
    if packaged and (why := package.lacking()):
        pytest.skip(why)

    by_ansible = suite == "forky"
    if by_ansible and (why := sshd.lacking()):
        pytest.skip(why)

    def script(text: str, part: str) -> str:
        for name, words in (BY_ANSIBLE if by_ansible else BY_HAND).items():
            text = text.replace(name, words)
        text = (
            text.replace("OTHER", other)
            .replace("INSTALL", PACKAGED if packaged else INSTALL)
            .replace("UPGRADE", UPGRADE if suite == "trixie" else "")
            .replace("EARLY", REMOVED_TOO_EARLY if suite == "forky" else "")
            .replace("PURGED", PURGED if packaged else "")
            .replace("COMPILED", COMPILED if suite == "forky" else "")
            .replace("WARM", WARM)
            .replace("WAIT", WAIT)
            .replace("PROBE", "" if suite == "bookworm" else PROBE)
            .replace("FS", fs)
            .replace("/job/out/", f"/job/out/{part}/")
        )
        text = text.replace("SIZE", size).replace("COUNT", f"--count {count}")
        return f"mkdir -p /job/out/{part}\n{text}"

    files: dict[str, Content] = {"program.py": PROGRAM}
    if packaged:
        deb = package.package()
        files |= {"emupmem.deb": deb, "emupmem-newer.deb": package.newer(deb, tmp_path)}
    made, told = image(suite, firmware), dict[str, dict[str, Any]]()
    if suite == "forky":
        files |= package.compiled(deb, made, tmp_path)
    reached = Reached(made, tmp_path / "reached") if by_ansible else None
    outside = (
        Outside(reached, ansible_steps(reached, told, size=size, count=count, fs=fs)) if reached else None
    )
    files |= reached.files if reached else {}
    with Machine(made, memory=memory, qemu_args=reached.arguments if reached else ()) as guest:
        scripts = [script(FIRST, "first"), script(SECOND, "second")]
        results = guest.boots(scripts, files, live=outside, last=suite != "bookworm")
        first, second = (part_of(results, n, name) for n, name in enumerate(("first", "second")))
        assert first.status is None if by_ansible else first.status == 0, first.output
        done(second)
        assert b"emupmem.service" not in first.files["analyze"], "systemd has nothing to say about the unit"
        applied = told["present"] if by_ansible else said(first, "apply.json")
        assert applied["mounts"][0]["dir"] == "/mnt/pmem0"
        assert said(first, "suggest.json")["plan"]["memmap"] == memmap
        assert said(first, "suggest.json")["source"] == "dmesg, agrees with /sys/firmware/memmap"
        assert said(first, "user.json")["plan"]["memmap"] == memmap
        assert (applied["memmap"], applied["reboot_required"]) == (memmap, True)
        assert said(first, "pending.json")["pending"] is True
        assert first.files["grub.cfg"].count(memmap.encode()) >= 2

        assert "/dev/pmem0 is mounted at /mnt/pmem0" in second.files["journal"].decode()
        assert second.files["owner"] == b"dev:dev 755\n"
        faults = int(second.files["faults"].split()[1])
        assert 4 <= faults < 64, "8 MiB by 2 MiB, and a few of the interpreter"
        found = said(second, "verify.json")
        assert [c["status"] for c in found["checks"]] == ["ok"] * 12, found
        names = ["filesystem", "mounted", "dax-file", "map-sync", "huge-pages"]
        assert [c["name"] for c in found["checks"]][7:] == names
        start, each = 4 * GIB, int(size[:-1]) * (GIB if size[-1] == "G" else MIB)
        assert found["devices"] == [
            {"dev": f"/dev/pmem{n}", "start": start + n * each, "size": each} for n in range(count)
        ]
        end = start + each - 1
        assert f"user: [mem 0x{start:016x}-0x{end:016x}]" in second.files["dmesg"].decode()
        assert words in second.files["dmesg"].decode()
        proof = {"dax_file": True, "map_sync": True, "huge_pages": True}
        where = {"device": "/dev/pmem0", "dir": "/mnt/pmem0", "fs": other}
        assert said(second, "other.json") == {**where, **proof, "changed": True}
        assert said(second, "user.json")["ok"] is True
        assert said(second, "suggest.json")["plan"]["memmap"] == memmap, "planned from the firmware's own map"
        assert b"region0 has no block device; nd_pmem is not loaded" in second.files["unloaded"]
        assert b"modprobe nd_pmem" in second.files["unloaded"]

        if by_ansible:
            assert told["restart"]["rebooted"] is True
            seen = [
                [(c["name"], c["status"]) for c in checks]
                for checks in (told["verify"]["checks"], found["checks"])
            ]
            assert seen[0] == seen[1]
            assert (told["absent"]["changed"], told["absent"]["reboot_required"]) == (True, True)
        if packaged:
            assert second.files["left"] == b"", "nothing of the package is left"
        if suite == "forky":
            removed = " ".join(second.files["removed"].decode().split())  # apt gives dpkg a terminal
            assert "memmap=1G!4G in GRUB_CMDLINE_LINUX: the memory stays reserved" in removed
            assert "/etc/systemd/system/emupmem.service, which no longer mounts /mnt/pmem0" in removed
            assert "install emupmem again, sudo emupmem remove, then remove the package" in removed
        if packaged:
            return  # GRUB's menu is the old one to the byte: it started the first boot
        third = done(guest.boot(THIRD, last=True))
        assert "Nothing is reserved." in third.output
        assert said(third, "verify.json")["devices"] == []


FAULTS = (
    FEWER
    + """
set -eu
. /job/warm
update-grub2
cp -p /etc/default/grub /root/default
cp -p /boot/grub/grub.cfg /root/cfg
same() {
    cmp /etc/default/grub /root/default
    cmp /boot/grub/grub.cfg /root/cfg
    [ -z "$(ls -A /etc/default | grep emupmem)" ]
}
fails() {
    emupmem apply --size 1G --yes 2> /root/said && exit 9 || [ $? = 1 ]
    cat /root/said
    if grep 'could be put back' /root/said; then exit 8; fi
    same
}

# generators that fail, at once or late, or lie (found before the real one)
printf '#!/bin/sh\\nexit 3\\n' > /usr/local/sbin/update-grub2
chmod +x /usr/local/sbin/update-grub2
fails
printf '#!/bin/sh\\n: > /boot/grub/grub.cfg\\nexit 3\\n' > /usr/local/sbin/update-grub2
fails
printf '#!/bin/sh\\nexit 0\\n' > /usr/local/sbin/update-grub2
fails
rm /usr/local/sbin/update-grub2

# the default is immutable; its file system is full, is read-only; so is that of the menu
chattr +i /etc/default/grub
fails
chattr -i /etc/default/grub
truncate -s 2M /root/small.img
mkfs.ext4 -q -b 1024 -O ^has_journal /root/small.img
mount -o loop /root/small.img /mnt
cp -a /etc/default/. /mnt/
dd if=/dev/zero of=/mnt/filler bs=1024 2>/dev/null || true
mount --bind /mnt /etc/default
fails
mount -o remount,ro /mnt
mount -o remount,bind,ro /etc/default
fails
umount /etc/default
umount /mnt
mount --bind /boot/grub /boot/grub
mount -o remount,bind,ro /boot/grub
fails
umount /boot/grub

# a drop-in that overrides is named by file and line, and one of our own extends it
mkdir -p /etc/default/grub.d
printf '# image\\nGRUB_CMDLINE_LINUX="net.ifnames=0"\\n' > /etc/default/grub.d/50-image.cfg
emupmem apply --size 1G --yes 2> /job/out/dropin
cmp /etc/default/grub /root/default
grep -c 'net.ifnames=0 memmap=1G!4G' /boot/grub/grub.cfg
emupmem remove --yes
[ ! -e /etc/default/grub.d/zz-emupmem.cfg ]
rm /etc/default/grub.d/50-image.cfg
cp -p /root/cfg /boot/grub/grub.cfg
same

# killed while it waits for the generator: the next remove and the next apply find their way
printf '#!/bin/sh\\necho $PPID $$ > /run/waiting\\nexec sleep 1000\\n' > /usr/local/sbin/update-grub2
chmod +x /usr/local/sbin/update-grub2
for finish in remove apply; do
    rm -f /run/waiting
    emupmem apply --size 1G --yes &
    until [ -s /run/waiting ]; do sleep 0.2; done
    kill -KILL $(cat /run/waiting)
    wait || true
    mv /usr/local/sbin/update-grub2 /root/hangs
    grep -q 'memmap=1G!4G' /etc/default/grub
    if [ $finish = remove ]; then
        emupmem remove --yes
        cmp /etc/default/grub /root/default
        cmp /boot/grub/grub.cfg /root/cfg
        mv /root/hangs /usr/local/sbin/update-grub2
    fi
done
emupmem apply --size 1G --yes
grep -c 'memmap=1G!4G' /boot/grub/grub.cfg
emupmem remove --yes
same

# what the kernel would misread is found before the reboot: a $ that GRUB eats, a unit that is none, a backslash
cp -p /etc/default/grub /root/stock
while read -r wrong; do
    { grep -v '^GRUB_CMDLINE_LINUX=' /root/stock; printf 'GRUB_CMDLINE_LINUX="%s"\\n' "$wrong"; } > /etc/default/grub
    cp -p /etc/default/grub /root/default
    fails
    cat /root/said >> /job/out/mangled
done <<'END'
memmap=64K\\$0x18690000
memmap=1GiB!6G
memmap=1G\\\\\\\\!6G
END

# Ubuntu's cloud images have the last word on a variable; and the line is as long as the kernel reads it, or longer
cat > /etc/default/grub.d/50-cloudimg-settings.cfg <<'END'
# Cloud Image specific Grub settings for Generic Cloud Images
# Set the recordfail timeout
GRUB_RECORDFAIL_TIMEOUT=0
# Do not wait on grub prompt
GRUB_TIMEOUT=0
# Set the default commandline
GRUB_CMDLINE_LINUX_DEFAULT="console=tty1 console=ttyS0"
# Set the grub console type
GRUB_TERMINAL=console
END
base="$(sed 's/ SPARE//' /proc/cmdline | tr -d '\\n') console=tty1 memmap=1G!4G x="
for more in 1 0; do
    fill=$(head -c $((2047 + more - ${#base})) /dev/zero | tr '\\0' a)
    { grep -v '^GRUB_CMDLINE_LINUX=' /root/stock; echo "GRUB_CMDLINE_LINUX='x=$fill'"; } > /etc/default/grub
    emupmem apply --size 1G --variable GRUB_CMDLINE_LINUX_DEFAULT --yes 2>> /job/out/cloud && break
done
[ $more = 0 ]
[ -e /etc/default/grub.d/zz-emupmem.cfg ]
sync
"""
)

# The reservation came through our drop-in, whole; it is taken back, and then the power is cut while the menu is made.
CLOUD = """
set -eux
[ $(tr -d '\\n' < /proc/cmdline | wc -c) = 2047 ]
grep -c 'console=tty1 console=ttyS0 memmap=1G!4G$' /proc/cmdline
emupmem verify
emupmem remove --yes
[ ! -e /etc/default/grub.d/zz-emupmem.cfg ]
rm /etc/default/grub.d/50-cloudimg-settings.cfg
cp -p /root/stock /etc/default/grub
cp -p /root/cfg /boot/grub/grub.cfg
cp -p /root/stock /root/default
# (in two pieces, or the words that bash shows would cut it here)
printf '#!/bin/sh\\necho CUT-""NOW > /dev/ttyS1\\nsleep 1000\\n' > /usr/local/sbin/update-grub2
chmod +x /usr/local/sbin/update-grub2
sync
emupmem apply --size 1G --yes
"""

AFTER_THE_CUT = """
set -eux
rm -f /usr/local/sbin/update-grub2
emupmem verify && exit 9 || [ $? = 3 ]
emupmem apply --size 1G --yes
grep -c 'memmap=1G!4G' /boot/grub/grub.cfg
emupmem remove --yes
cmp /etc/default/grub /root/default
cmp /boot/grub/grub.cfg /root/cfg
"""


@pytest.mark.vm(image="bookworm bios", boots=3, seconds=280)
def test_whatever_fails_the_old_configuration_stays() -> None:
    with Machine(image("bookworm", "bios")) as guest:
        faults = done(guest.boot(FAULTS.replace("SPARE", SPARE)))
        assert b"/etc/default/grub.d/50-image.cfg:2" in faults.files["dropin"]
        assert faults.files["mangled"].count(b"emupmem: ") == 3
        cloud = faults.files["cloud"]
        assert b"longer than the 2047 bytes that the kernel reads" in cloud
        assert b"/etc/default/grub.d/50-cloudimg-settings.cfg:7" in cloud
        cut = guest.boot(CLOUD, power_cut="CUT-NOW")
        assert cut.status is None, cut.output
        done(guest.boot(AFTER_THE_CUT, last=True))
