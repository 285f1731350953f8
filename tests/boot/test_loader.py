# SPDX-License-Identifier: Apache-2.0
"""Other boot loaders than GRUB with grub-mkconfig, on machines in a folder.

The programs of those distributions are not here. Stand-ins do what their documentation and sources say
of them, the unpleasant parts included: grubby deletes all arguments of a name, sdbootutil copies
/etc/kernel/cmdline into the entries, rpm-ostree sorts by key. systemd-boot itself is booted in
tests/vm/test_vm_loader.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from emupmem.boot import change, detect, grub_bls, loader, obstacles, prepare, rpm_ostree, transaction
from emupmem.boot import kernelstub as boot_kernelstub
from emupmem.boot import proxmox_boot_tool as boot_proxmox
from emupmem.boot import sdboot_manage as boot_sdboot_manage
from emupmem.boot import systemd_boot as boot_systemd_boot
from emupmem.boot.bls import text as bls_text
from emupmem.device import boot_unit, unit
from emupmem.kernel.cmdline import WITHOUT_KMEM, kaslr_avoided, parse_command_line
from emupmem.model import GIB, Command, DeviceKind, EmupmemError, Request
from emupmem.planner import survey
from emupmem.planner.situation import Situation
from emupmem.system.backups import BACKUPS
from emupmem.system.machine import Machine
from emupmem.system.programs import Completed
from emupmem.verifier import ladder, observe
from emupmem.verifier.observation import Verdict
from tests import fake, played
from tests.boot import generators
from tests.fake import RELEASE, FakeMachine, put, script
from tests.scenario import kernel

ID = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
ROOT = "root=UUID=0 ro quiet"
ENTRY = f"""# Boot Loader Specification type#1 entry
title      Debian GNU/Linux
version    {RELEASE}
machine-id {ID}
sort-key   debian
options    {ROOT} systemd.machine_id={ID}
linux      /{ID}/{RELEASE}/linux
initrd     /{ID}/{RELEASE}/initrd.img-{RELEASE}
"""
FEDORA = f"""title Fedora Linux ({RELEASE})
version {RELEASE}
linux /vmlinuz-{RELEASE}
initrd /initramfs-{RELEASE}.img
options OPTIONS
grub_users $grub_users
grub_arg --unrestricted
grub_class fedora
"""
EFI_NAME = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"

# After grubby-bls of grubby 8.40-63.el9; with OLD after that of 8.40-48.el8, which puts $kernelopts into entries
# that come to the same. --update-kernel=ALL with --args and --remove-args; left out are all other actions, zipl,
# the grub2-mkconfig of ppc64le and rpm-sort (names sort plainly). Its habits:
# arguments of the same name go, the new ones come last; sed takes \\ and & of a value for its own, and writes a
# file of its own first; of two options lines each becomes both; the line of GRUB_CMDLINE_LINUX_DEFAULT is changed
# with the other; grub2-editenv makes a block where there is none, and writes in place, through a link;
# /etc/kernel/cmdline is made of the oldest entry, of its lines the first is kept, it is written in place.
GRUBBY = """
import os, pathlib, re, signal, sys
root = pathlib.Path(ROOT)
fail = (root / "fail").read_text() if (root / "fail").exists() else ""

def stop(when):
    if fail == when:
        (root / "boot/loader/entries/sedAbC123").write_text("half")
        sys.exit("grubby: disk full")

def rename(file, text):
    fresh = file.with_name("sedXXXXXX")
    fresh.write_text(text)
    fresh.chmod(file.stat().st_mode & 0o7777)
    os.replace(fresh, file)

given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
if "--help" in sys.argv:
    print("Usage: grubby [OPTION...]", "--no-etc-grub-update" if QUIET else "")
    sys.exit()
assert given["--update-kernel"] == "ALL"
add, gone = given.get("--args", "").split(), given.get("--remove-args", "").split()
stop("start")

def update(line):
    names = {a.split("=")[0] for a in add} | {g for g in gone if "=" not in g}
    words = [w for w in line.split() if w.split("=")[0] not in names and w not in gone]
    return " ".join(words + add)

def sed(value):
    return re.sub(r"\\\\(.)", r"\\1", value)

def options(file):
    return " ".join(re.findall(r"^options[ \\t]+(.*)$", file.read_text(), re.M))

env = root / "boot/grub2/grubenv"
if not env.exists():
    env.write_text("# GRUB Environment Block\\n" + "#" * 999)
text = env.read_text()
entries = sorted((root / "boot/loader/entries").glob("*.conf"))
found = re.search(r"^kernelopts=(.+)$", text, re.M)
known = found[1] if found else ""
before = {file: options(file).replace("$kernelopts", known or "$kernelopts") for file in entries}
opts = ""
grub = root / "etc/default/grub"
line = re.search(r'^GRUB_CMDLINE_LINUX="(.*)"$', grub.read_text(), re.M)
if (not QUIET or "--no-etc-grub-update" not in sys.argv) and line[1]:
    opts = update(line[1])
    rename(grub, re.sub("^GRUB_CMDLINE_LINUX.*", 'GRUB_CMDLINE_LINUX="%s"' % opts, grub.read_text(), flags=re.M))
if known:
    opts = update(known)
    env.write_text(text.replace(found[0], "kernelopts=" + opts))
for file in reversed(entries):
    new = sed(update(before[file]))
    if "$kernelopts" not in options(file):
        new = "$kernelopts" if OLD and opts == new else new
        rename(file, re.sub("^options.*", lambda _: "options " + new, file.read_text(), flags=re.M))
    stop("half")
cmdline = root / "etc/kernel/cmdline"
if cmdline.parent.exists():  # else bash complains, and goes on
    if not cmdline.exists():
        cmdline.write_text((before[entries[0]] if entries else "") + "\\n")
    cmdline.write_text(update((cmdline.read_text().splitlines() or [""])[0]) + "\\n")
stop("end")
if fail == "interrupt":
    os.kill(os.getppid(), signal.SIGINT)
if fail == "wrong":
    rename(entries[0], entries[0].read_text().replace("memmap=", "memmmap=").replace(known or "root=", "rot="))
    env.write_text(env.read_text().replace("memmap=", ""))
"""

# After sdbootutil of 2026-08-21 (12630b2), without NEW after one that knows add-all-kernels only. update-all-entries
# changes the options of the running snapshot's entries, in place; left out are TPM predictions, the room it makes
# on a full partition, transactional-update and the kernels that add-kernel and add-all-kernels copy.
# The words are those of /etc/kernel/cmdline and of all files in cmdline.d; root= and rootflags= are put right.
SDBOOTUTIL = """
import os, pathlib, re, signal, sys
root = pathlib.Path(ROOT)
fail = (root / "fail").read_text() if (root / "fail").exists() else ""
if "--help" in sys.argv:
    print("update-all-entries [SNAPSHOT]" if NEW else "add-all-kernels [SNAPSHOT]")
    sys.exit()
assert sys.argv[1:] == ["update-all-entries" if NEW else "add-all-kernels"] or sys.argv[1] == "add-kernel"
if fail == "start":
    sys.exit("Error: no space left")
running = re.search(r"rootflags=subvol=(\\S+)", (root / "proc/cmdline").read_text())[1]
files = [root / "etc/kernel/cmdline", *sorted((root / "etc/kernel/cmdline.d").glob("*"))]
words = [x for file in files for x in file.read_text().splitlines() if not x.startswith("#")]
line = re.sub(r"\\brootflags=subvol=\\S*", "rootflags=subvol=" + running, " ".join(" ".join(words).split()))
line += "" if "rootflags=subvol=" in line else " rootflags=subvol=" + running
line = line.replace("memmap", "memmmap") if fail == "wrong" else line
if sys.argv[1] == "add-kernel":
    number = running.split("/")[-2]
    text = f"title openSUSE\\nversion {number}@{sys.argv[2]}\\noptions    {line}\\nlinux /{sys.argv[2]}/linux\\n"
    (root / "boot/efi/loader/entries" / f"opensuse-{sys.argv[2]}-{number}.conf").write_text(text)
    sys.exit()
for file in sorted((root / "boot/efi/loader/entries").glob("*.conf")):
    text = file.read_text()
    if re.search(r"root=UUID=0 .*rootflags=subvol=" + re.escape(running), text):
        file.write_text(re.sub(r"^options.*$", "options    " + line, text, flags=re.M))
        if fail == "half":
            sys.exit("Error: no space left")
if fail == "end":
    sys.exit("Error: no space left")
if fail == "interrupt":
    os.kill(os.getppid(), signal.SIGINT)
"""

# After `rpm-ostree kargs` (src/app/rpmostree-builtin-kargs.cxx at 6246b99), `rpm-ostree status --json` and `ostree
# admin pin` of ostree 2025.2. The arguments are those of the default deployment; a change makes it anew, or one more
# beside that which runs. Left out are locks, staging until the shutdown, and all other actions. Its habits: --delete
# must name a word that is there; words are grouped by their key; to pin what is pinned is no failure; a deployment is
# there as a whole or not at all.
RPM_OSTREE = """
import os, sys
file, pins = ROOT + "/kargs", ROOT + "/pins"

def read(name):
    return open(name).read() if os.path.exists(name) else ""

def write(name, text):
    os.makedirs(ROOT + "/var", exist_ok=True)
    with open(ROOT + "/var/new", "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(ROOT + "/var/new", name)
    os.fsync(os.open(ROOT, os.O_RDONLY))

words = read(file).split()
if sys.argv[0].endswith("/ostree"):
    if "--help" in sys.argv:
        print("INDEX can be >= 0 or one of booted, pending or rollback strings")
        sys.exit()
    kept = set(read(pins).split())
    kept = kept - {sys.argv[-1]} if "--unpin" in sys.argv else kept | {sys.argv[-1]}
    write(pins, " ".join(sorted(kept)))
    if not kept:
        os.remove(pins)
    sys.exit()
if sys.argv[1] == "status":
    pinned = ["true" if name in read(pins) else "false" for name in ("booted", "rollback")]
    print('{"deployments": [{"booted": true, "pinned": %s}, {"booted": false, "pinned": %s}]}' % tuple(pinned))
    sys.exit()
if len(sys.argv) == 2:
    print(HEAD + " ".join(words))
    sys.exit()
for option in sys.argv[2:]:
    name, _, word = option.partition("=")
    if name == "--delete":
        if word not in words:
            sys.exit(f"error: No karg '{word}' found")
        words.remove(word)
    elif name == "--append":
        words.append(word)
    else:
        sys.exit(f"error: Unknown option {name}")
keys = list(dict.fromkeys(w.split("=")[0] for w in words))
write(file, " ".join(sorted(words, key=lambda w: keys.index(w.split("=")[0]))))
if os.path.exists(ROOT + "/fail"):
    sys.exit("error: while staging")
"""


def program(machine: FakeMachine, name: str, text: str, **names: object) -> None:
    """Put a stand-in into the folder; it works in the folder that it lies in."""
    head = "ROOT = __file__.rpartition('/sbin/')[0]\n" + "".join(f"{k} = {v!r}\n" for k, v in names.items())
    script(machine, name, f"{played.HEAD}{head}{text}")


def efi(machine: Machine, name: str, text: str) -> None:
    put(machine, f"/sys/firmware/efi/efivars/{name}-{EFI_NAME}", b"\x06\0\0\0" + text.encode("utf-16-le"))


def without_grub(machine: FakeMachine) -> None:
    for name in ("etc/default/grub", "boot/grub/grub.cfg", "sbin/update-grub2"):
        (machine.root / name).unlink()


def systemd_boot(root: Path) -> FakeMachine:
    machine = fake.build(root)
    without_grub(machine)
    efi(machine, "LoaderInfo", "systemd-boot 257.8-1")
    put(machine, "/etc/machine-id", f"{ID}\n")
    put(machine, "/etc/kernel/cmdline", f"{ROOT}\n")
    put(machine, "/boot/efi/loader/loader.conf", "#timeout 3\n")
    put(machine, f"/boot/efi/loader/entries/{ID}-{RELEASE}.conf", ENTRY)
    put(machine, f"/boot/efi/loader/entries/{ID}-6.1.0-9.conf", ENTRY.replace(RELEASE, "6.1.0-9"))
    put(machine, f"/boot/efi/loader/entries/{OTHER}-1.conf", ENTRY.replace(ID, OTHER))
    put(machine, "/boot/efi/loader/entries/windows.conf", "title Windows\nefi /EFI/Microsoft/x.efi\n")
    put(machine, "/proc/cmdline", f"initrd=\\x {ROOT} systemd.machine_id={ID}\n")
    script(machine, "kernel-install", "#!/bin/sh\n")
    return machine


def fedora(
    root: Path, options: str = ROOT, quiet: bool = True, env: str = "", old: bool = False
) -> FakeMachine:
    machine = fake.build(root, fake.STOCK + b"GRUB_ENABLE_BLSCFG=true\n")
    (machine.root / "boot/grub/grub.cfg").unlink()
    (machine.root / "sbin/update-grub2").unlink()
    put(machine, "/boot/grub2/grub.cfg", "insmod blscfg\nblscfg\n")
    put(machine, "/boot/grub2/grubenv", f"# GRUB Environment Block\nsaved_entry={ID}-{RELEASE}\n{env}")
    put(machine, "/etc/kernel/cmdline", f"{ROOT}\n")
    put(machine, f"/boot/loader/entries/{ID}-{RELEASE}.conf", FEDORA.replace("OPTIONS", options))
    put(machine, f"/boot/loader/entries/{ID}-0-rescue.conf", FEDORA.replace("OPTIONS", options))
    program(machine, "grubby", GRUBBY, QUIET=quiet, OLD=old)
    return machine


def fedora_without_cmdline(root: Path) -> FakeMachine:
    """As Anaconda leaves it: grubby makes /etc/kernel/cmdline."""
    machine = fedora(root)
    (machine.root / "etc/kernel/cmdline").unlink()
    (machine.root / "etc/kernel").rmdir()
    return machine


def rhel8_uefi(root: Path) -> FakeMachine:
    """Menu and environment block in the EFI system partition, links to them where RHEL has them."""
    machine = fedora(root, "$kernelopts $tuned_params", env=f"kernelopts={ROOT}\n", old=True)
    esp = machine.root / "boot/efi/EFI/redhat"
    esp.mkdir(parents=True)
    for name in ("grub.cfg", "grubenv"):
        (machine.root / "boot/grub2" / name).rename(esp / name)
    (machine.root / "boot/grub2/grubenv").symlink_to("../efi/EFI/redhat/grubenv")
    (machine.root / "etc/grub2-efi.cfg").symlink_to("../boot/efi/EFI/redhat/grub.cfg")
    (machine.root / "etc/kernel/cmdline").unlink()
    put(machine, "/boot/efi/EFI/other/grub.cfg", "search x\nconfigfile $prefix/grub.cfg\n")
    put(machine, "/sys/firmware/efi/fw_platform_size", "64\n")
    return machine


def opensuse(root: Path, new: bool = True, first: Sequence[str] = ("", "")) -> FakeMachine:
    """Entries of two snapshots, of which the second one runs. `first` begins their names (grub2-bls has prefixes)."""
    machine = systemd_boot(root)
    put(machine, "/etc/kernel/entry-token", "opensuse\n")
    words = f"{ROOT} rootflags=subvol=@/.snapshots/5/snapshot"
    put(machine, "/proc/cmdline", words)
    put(machine, "/etc/kernel/cmdline", f"{words}\n")
    for name in machine.names("/boot/efi/loader/entries"):
        (machine.root / "boot/efi/loader/entries" / name).unlink()
    for number in (4, 5):
        text = ENTRY.replace(f"machine-id {ID}\n", "").replace(f" systemd.machine_id={ID}", "")
        text = text.replace(ROOT, words.replace("/5/", f"/{number}/"))
        name = f"{first[number - 4]}opensuse-{RELEASE}-{number}.conf"
        put(machine, f"/boot/efi/loader/entries/{name}", text)
    program(machine, "sdbootutil", SDBOOTUTIL, NEW=new)
    return machine


def ostree(root: Path, head: str = "") -> FakeMachine:
    machine = fake.build(root)
    without_grub(machine)
    put(machine, "/run/ostree-booted", "")
    put(machine, "/kargs", f"rw {ROOT} console=tty0 console=ttyS0 memmap=64K$0x1000")
    program(machine, "rpm-ostree", RPM_OSTREE, HEAD=head)
    return machine


POP_OPTIONS = ["quiet", "loglevel=0", "console=tty0", "console=ttyS0", 'acpi_osi="Windows 2012"', "splash"]
POP_CONFIG = {
    "default": {
        "kernel_options": ["quiet", "splash"],
        "esp_path": "/boot/efi",
        "setup_loader": False,
        "manage_mode": False,
        "force_update": False,
        "live_mode": False,
        "config_rev": 3,
    },
    "user": {
        "kernel_options": POP_OPTIONS,
        "esp_path": "/boot/efi",
        "setup_loader": True,
        "manage_mode": True,
        "force_update": False,
        "live_mode": False,
        "config_rev": 3,
    },
}
RECOVERY = "title Pop!_OS recovery\nlinux /EFI/Recovery-1A/vmlinuz.efi\noptions boot=casper hostname=recovery quiet\n"


def pop(
    root: Path, options: object = POP_OPTIONS, kernels: Sequence[str] = ("6.9.3-7", RELEASE)
) -> FakeMachine:
    """Pop!_OS as its installer and a kernel update leave it: kernelstub has run."""
    machine = fake.build(root)
    without_grub(machine)
    efi(machine, "LoaderInfo", "systemd-boot 255.4-1ubuntu8")
    efi(machine, "LoaderEntrySelected", "Pop_OS-current.conf")
    put(machine, "/etc/os-release", 'NAME="Pop!_OS"\nID=pop\nID_LIKE="ubuntu debian"\n')
    put(machine, "/etc/machine-id", f"{ID}\n")
    put(
        machine,
        "/proc/cmdline",
        f"initrd=\\EFI\\Pop_OS-0\\initrd.img root=UUID=0 ro {' '.join(POP_OPTIONS)}\n",
    )
    for release in kernels:
        put(machine, f"/boot/vmlinuz-{release}", kernel.image(release))
        put(machine, f"/boot/initrd.img-{release}", f"initrd of {release}\n")
    user = {**POP_CONFIG["user"], "kernel_options": options}
    put(machine, "/etc/kernelstub/configuration", json.dumps({**POP_CONFIG, "user": user}, indent=2))
    put(machine, "/boot/efi/loader/loader.conf", "timeout 5\ndefault Pop_OS-current\n")
    put(machine, "/boot/efi/loader/entries/Recovery-1A.conf", RECOVERY)
    program(machine, "kernelstub", generators.KERNELSTUB)
    script(machine, "kernel-install", "#!/bin/sh\n")  # systemd's, which nothing calls there
    ran = machine.output("kernelstub")
    assert ran is not None
    assert ran.status == 0, ran
    if isinstance(options, str):  # as an older version, or a package of the vendor's, writes it
        put(machine, "/etc/kernelstub/configuration", json.dumps({**POP_CONFIG, "user": user}, indent=2))
    return machine


CACHY_CONFIG = """# Config file for sdboot-manage
LINUX_OPTIONS="zswap.enabled=0 nowatchdog quiet splash"
#LINUX_FALLBACK_OPTIONS=""

REMOVE_EXISTING="no"
OVERWRITE_EXISTING="yes"
REMOVE_OBSOLETE="yes"
"""
CACHY_WINDOWS = "title Windows\nefi /EFI/Microsoft/x.efi\n"


def cachyos(root: Path, config: str = CACHY_CONFIG, fallback: bool = False) -> FakeMachine:
    """CachyOS with two kernels and an entry for another system: sdboot-manage has run."""
    machine = fake.build(root)
    without_grub(machine)
    efi(machine, "LoaderInfo", "systemd-boot 257.5-1-arch")
    efi(machine, "LoaderEntrySelected", "linux-cachyos.conf")
    put(machine, "/etc/machine-id", f"{ID}\n")
    put(machine, "/proc/cmdline", "initrd=\\x root=UUID=0 rw zswap.enabled=0 nowatchdog quiet splash\n")
    for name, release in (("linux-cachyos", RELEASE), ("linux-lts", "6.6.1-1-lts")):
        put(machine, f"/boot/vmlinuz-{name}", kernel.image(release))
        put(machine, f"/boot/initramfs-{name}.img", "")
        if fallback:
            put(machine, f"/initramfs-{name}-fallback.img", "")
    put(machine, "/boot/loader/loader.conf", "timeout 3\ndefault linux-cachyos.conf\n")
    put(machine, "/boot/loader/entries/.keep", "")
    put(machine, "/etc/sdboot-manage.conf", config)
    script(machine, "sdboot-manage", f"#!/bin/bash\n{generators.SDBOOT_MANAGE}")
    ran = machine.output("sdboot-manage", "gen")
    assert ran is not None
    assert ran.status == 0, ran
    put(machine, "/boot/loader/entries/windows.conf", CACHY_WINDOWS)
    return machine


PROXMOX_LINE = "root=ZFS=rpool/ROOT/pve-1 boot=zfs quiet"
PROXMOX_UUIDS = {"1234-ABCD": "esps/a", "5678-EF01": "esps/b"}


def proxmox(
    root: Path, cmdline: str | None = f"{PROXMOX_LINE}\n", uuids: Sequence[str] = tuple(PROXMOX_UUIDS)
) -> FakeMachine:
    """Proxmox on ZFS and UEFI with two partitions and two kernels: proxmox-boot-tool has run."""
    machine = fake.build(root)
    (machine.root / "sbin/update-grub2").unlink()
    efi(machine, "LoaderInfo", "systemd-boot 252.12-1")
    put(machine, "/sys/firmware/efi/fw_platform_size", "64\n")
    put(machine, "/proc/cmdline", f"initrd=\\EFI\\proxmox\\{RELEASE}\\initrd.img-{RELEASE} {PROXMOX_LINE}\n")
    put(machine, "/etc/kernel/proxmox-boot-uuids", "".join(f"{u}\n" for u in uuids))
    if cmdline is not None:
        put(machine, "/etc/kernel/cmdline", cmdline)
    put(machine, "/boot/grub/grubenv", "# GRUB Environment Block\n")
    put(machine, "/packages", f"{RELEASE} 6.8.12-1-pve\n")
    for release in (RELEASE, "6.8.12-1-pve"):
        put(machine, f"/boot/vmlinuz-{release}", kernel.image(release))
        put(machine, f"/boot/initrd.img-{release}", f"initrd of {release}\n")
    for number, (uuid, esp) in enumerate(PROXMOX_UUIDS.items()):
        put(machine, f"/dev/sd{'ab'[number]}2", f"{esp}\n")
        (machine.root / "dev/disk/by-uuid").mkdir(parents=True, exist_ok=True)
        (machine.root / f"dev/disk/by-uuid/{uuid}").symlink_to(f"../../sd{'ab'[number]}2")
        put(machine, f"/{esp}/loader/loader.conf", "timeout 3\ndefault proxmox-*\n")
        (machine.root / esp / "loader/entries").mkdir()
        (machine.root / esp / "EFI/proxmox").mkdir(parents=True)
    put(machine, "/esps/a/loader/entries/memtest.conf", "title Memtest\nefi /memtest.efi\n")
    script(machine, "unshare", generators.UNSHARE)
    program(machine, "proxmox-boot-tool", generators.PROXMOX_BOOT_TOOL)
    ran = machine.output("proxmox-boot-tool", "refresh")
    assert ran is not None
    assert ran.status == 0, ran
    return machine


MACHINES: dict[str, tuple[Callable[[Path], FakeMachine], type[loader.Loader]]] = {
    "systemd-boot": (systemd_boot, boot_systemd_boot.SystemdBoot),
    "grub-bls": (fedora, grub_bls.GrubBls),
    "grub-bls-old-grubby": (lambda root: fedora(root, quiet=False), grub_bls.GrubBls),
    "grub-bls-kernelopts": (
        lambda root: fedora(root, "$kernelopts $tuned_params", env=f"kernelopts={ROOT}\n"),
        grub_bls.GrubBls,
    ),
    "grub-bls-without-cmdline": (fedora_without_cmdline, grub_bls.GrubBls),
    "grub-bls-rhel8-uefi": (rhel8_uefi, grub_bls.GrubBls),
    "sdbootutil": (opensuse, boot_systemd_boot.SdBootUtil),
    "sdbootutil-grub2": (
        lambda root: opensuse(root, first=("snapper-", "system-")),
        boot_systemd_boot.SdBootUtil,
    ),
    "sdbootutil-old": (lambda root: opensuse(root, new=False), boot_systemd_boot.SdBootUtil),
    "kernelstub": (pop, boot_kernelstub.Kernelstub),
    "kernelstub-string": (lambda root: pop(root, " ".join(POP_OPTIONS)), boot_kernelstub.Kernelstub),
    "kernelstub-one-kernel": (lambda root: pop(root, kernels=[RELEASE]), boot_kernelstub.Kernelstub),
    "sdboot-manage": (cachyos, boot_sdboot_manage.SdbootManage),
    "sdboot-manage-fallback": (lambda root: cachyos(root, fallback=True), boot_sdboot_manage.SdbootManage),
    "sdboot-manage-skips": (
        lambda root: cachyos(root, CACHY_CONFIG.replace('OVERWRITE_EXISTING="yes"', "")),
        boot_sdboot_manage.SdbootManage,
    ),
    "sdboot-manage-removes": (
        lambda root: cachyos(root, CACHY_CONFIG.replace('REMOVE_EXISTING="no"', "")),
        boot_sdboot_manage.SdbootManage,
    ),
    "proxmox-boot-tool": (proxmox, boot_proxmox.ProxmoxBootTool),
    "proxmox-boot-tool-without-cmdline": (lambda root: proxmox(root, None), boot_proxmox.ProxmoxBootTool),
    "proxmox-boot-tool-one-is-gone": (
        lambda root: proxmox(root, uuids=("0000-0000", "1234-ABCD")),
        boot_proxmox.ProxmoxBootTool,
    ),
    "rpm-ostree": (ostree, rpm_ostree.RpmOstree),
    "rpm-ostree-old": (lambda root: ostree(root, "The kernel arguments are:\n"), rpm_ostree.RpmOstree),
}


BASIC = (
    "systemd-boot",
    "grub-bls",
    "sdbootutil",
    "kernelstub",
    "sdboot-manage",
    "proxmox-boot-tool",
    "rpm-ostree",
)
"""Those of the inner loop; the others are variations of them."""


@pytest.fixture(params=[n if n in BASIC else pytest.param(n, marks=pytest.mark.slow) for n in MACHINES])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> FakeMachine:
    return MACHINES[request.param][0](tmp_path)


def survey_of(machine: FakeMachine) -> survey.Survey:
    return survey.of_machine(machine, boots=prepare.next_line(machine))


def apply(
    machine: FakeMachine, size: int = GIB, *, add: bool = False, replace: bool = False, nokaslr: bool = False
) -> change.Outcome | None:
    options = loader.Options(add=add, replace=replace, nokaslr=nokaslr)
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(size), options)
    return transaction.carry_out_change(machine, prepared) if prepared.needed else None


def remove(machine: FakeMachine) -> change.Outcome | None:
    prepared = prepare.prepare_remove(machine)
    return transaction.carry_out_change(machine, prepared) if prepared.needed else None


def generated_as_planned(machine: FakeMachine) -> Verdict:
    """What verify says, which finds nothing wrong with the entries."""
    verdict = ladder.verdict_of(observe.observe(machine, 0))
    assert {c.name: c.status for c in verdict.checks}["generated"] == "ok", verdict
    return verdict


def boots_by_default(machine: FakeMachine, release: str) -> None:
    """That is the kernel of the next start, by entries that verify finds nothing wrong with."""
    target = obstacles.target(machine)
    assert target is not None
    assert target.release == release
    generated_as_planned(machine)


def lines(machine: FakeMachine) -> dict[str, str]:
    """The command line of every entry, as its loader hands it to the kernel."""
    other = detect.of(machine)
    return {
        f"{e.ids[0] or e.title}{'' if e.ours else ' (other)'}": e.text
        for e in other.standing(machine).entries
    }


def content(machine: FakeMachine) -> dict[str, bytes]:
    places = (
        "boot/efi/loader",
        "boot/loader",
        "etc/kernel",
        "etc/default",
        "boot/grub2",
        "etc/kernelstub",
        "esps",
        "kargs",
    )
    files = [f for p in places for f in [machine.root / p, *(machine.root / p).rglob("*")] if f.is_file()]
    return {str(f.relative_to(machine.root)): f.read_bytes() for f in files}


def is_changed_by(kind: type[loader.Loader], machine: FakeMachine) -> None:
    """Assert that this loader is found, refuses nothing, and boots our kernel."""
    assert type(detect.of(machine)) is kind
    obstacles.refuse_machine(machine)
    target = obstacles.target(machine)
    assert target is not None
    assert target.release == RELEASE


@pytest.mark.parametrize("name", MACHINES)
def test_each_machine_has_its_loader(name: str, tmp_path: Path) -> None:
    build, kind = MACHINES[name]
    machine = build(tmp_path)
    is_changed_by(kind, machine)


def test_apply_and_remove_leave_all_other_words_alone(here: FakeMachine) -> None:
    before = lines(here)
    files = content(here)
    outcome = apply(here)
    assert outcome is not None
    assert outcome.entries == sum("(other)" not in name for name in before)
    for name, line in lines(here).items():
        words = [] if "(other)" in name else ["1G!4G"]
        parsed = parse_command_line(line)
        assert [i.text for i in parsed.reservations] == words
        assert sorted(bls_text.foreign_words(parsed)) == sorted(
            bls_text.foreign_words(parse_command_line(before[name]))
        )
    verdict = generated_as_planned(here)
    assert {c.name: c.status for c in verdict.checks}["booted"] == "pending", verdict
    assert apply(here) is None, "the same again changes nothing"
    assert remove(here) is not None
    assert remove(here) is None
    after = content(here)
    assert {n: sorted(v.split()) for n, v in after.items()} == {
        n: sorted(v.split()) for n, v in files.items()
    }
    assert not list(here.root.rglob("*.emupmem-new"))
    assert here.names(BACKUPS), "what was there is kept"


@pytest.mark.slow
def test_replace_add_and_a_different_size(here: FakeMachine) -> None:
    apply(here)
    with pytest.raises(EmupmemError, match="there is a different reservation already: memmap=1G!4G"):
        apply(here, 2 * GIB)
    apply(here, 2 * GIB, replace=True)
    assert [i.text for i in prepare.next_line(here).reservations] == ["2G!4G"]
    apply(here, GIB, add=True)
    assert [i.text for i in prepare.next_line(here).reservations] == ["2G!4G", "1G!6G"]
    prepared = prepare.prepare_remove(here, ["memmap=2G!4G"])
    transaction.carry_out_change(here, prepared)
    assert [i.text for i in prepare.next_line(here).reservations] == ["1G!6G"]
    with pytest.raises(EmupmemError, match=r"there is no reservation 9G!4G"):
        prepare.prepare_remove(here, ["9G!4G"])


def test_a_plan_asks_no_program_the_same_twice(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = survey_of(here), []

    def run(command: Command, *more: object) -> Completed:
        asked.append(command.argv)
        return FakeMachine.run(here, command, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(here, "run", run)
    prepared = prepare.prepare_apply(here, found, Request(GIB), loader.Options())
    assert len(asked) == len(set(asked))
    asked.clear()
    transaction.carry_out_change(here, prepared)
    assert asked, "what has changed is asked again"


@pytest.mark.slow
def test_kinds_together(here: FakeMachine) -> None:
    """A pmem device, a memory tier beside it, each given back alone; the last removal leaves the old words."""
    put(here, "/usr/local/bin/emupmem", "")
    before, files = lines(here), content(here)
    apply(here)
    request = Request(4 * GIB, kind=DeviceKind.MEMORY, min_free=GIB)
    options = loader.Options(add=True)
    prepared = prepare.prepare_apply(here, survey_of(here), request, options)
    assert prepared.memmap == "memmap=1G!4G,4G%5G-1+0xefffffff"
    assert prepared.plan is not None
    assert not prepared.plan.needs_nokaslr
    transaction.carry_out_change(here, prepared)
    assert [i.text for i in prepare.next_line(here).reservations] == ["1G!4G", "4G%5G-1+0xefffffff"]
    assert boot_unit.recorded_kinds(here) == {(5 * GIB, 4 * GIB): DeviceKind.MEMORY}
    for _, line in lines(here).items():
        parsed = parse_command_line(line)
        assert set(kaslr_avoided(parsed)[0]) >= {i.span for i in parsed.pmem}
        assert (WITHOUT_KMEM in parsed.words) is bool(parsed.soft)
    assert WITHOUT_KMEM in prepare.next_line(here).words
    generated_as_planned(here)
    # what the unit makes of it changes alone
    dax = replace(request, kind=DeviceKind.DAX, offset=5 * GIB)
    with pytest.raises(EmupmemError, match="there is a different reservation already"):
        prepare.prepare_apply(here, survey_of(here), dax, loader.Options())
    transaction.carry_out_change(here, prepare.prepare_remove(here, ["1G!4G"]))
    assert [i.text for i in prepare.next_line(here).reservations] == ["4G%5G-1+0xefffffff"]
    prepared = prepare.prepare_apply(here, survey_of(here), dax, loader.Options(replace=True))
    assert prepared.unit.needed
    assert not prepared.boot_needed
    transaction.carry_out_change(here, prepared)
    assert boot_unit.recorded_kinds(here) == {(5 * GIB, 4 * GIB): DeviceKind.DAX}
    assert not prepare.prepare_apply(here, survey_of(here), dax, loader.Options()).needed
    transaction.carry_out_change(here, prepare.prepare_remove(here, ["4G%5G"]))
    assert not here.exists(unit.FILE)
    assert {n: sorted(v.split()) for n, v in lines(here).items()} == {
        n: sorted(v.split()) for n, v in before.items()
    }
    assert {n: sorted(v.split()) for n, v in content(here).items()} == {
        n: sorted(v.split()) for n, v in files.items()
    }


@pytest.mark.slow
def test_pmem_in_the_place_of_a_dax_device_needs_no_word(here: FakeMachine) -> None:
    put(here, "/usr/local/bin/emupmem", "")
    request = Request(GIB, kind=DeviceKind.DAX)
    transaction.carry_out_change(
        here, prepare.prepare_apply(here, survey_of(here), request, loader.Options())
    )
    assert WITHOUT_KMEM in prepare.next_line(here).words
    apply(here, replace=True)
    assert WITHOUT_KMEM not in " ".join(lines(here).values())
    assert WITHOUT_KMEM not in prepare.next_line(here).words
    assert not here.exists(unit.FILE)


@pytest.mark.slow
def test_nokaslr_that_is_needed_is_added_by_itself(here: FakeMachine) -> None:
    put(here, "/usr/local/bin/emupmem", "")
    request = Request(6 * GIB, kind=DeviceKind.DAX, min_free=GIB)
    prepared = prepare.prepare_apply(here, survey_of(here), request, loader.Options())
    transaction.carry_out_change(here, prepared)
    line = prepare.next_line(here)
    assert ([i.text for i in line.reservations], line.nokaslr) == (["6G%4G-1+0xefffffff"], True)
    remove(here)
    assert not prepare.next_line(here).nokaslr


@pytest.mark.slow
def test_nokaslr_comes_and_goes_with_the_reservation(here: FakeMachine) -> None:
    apply(here, nokaslr=True)
    assert prepare.next_line(here).nokaslr
    remove(here)
    assert not prepare.next_line(here).nokaslr


def test_variable_is_a_matter_of_grub_mkconfig(here: FakeMachine) -> None:
    options = loader.Options("GRUB_CMDLINE_LINUX_DEFAULT")
    with pytest.raises(EmupmemError, match="--variable names a variable of GRUB's"):
        prepare.prepare_apply(here, survey_of(here), Request(GIB), options)


def test_a_dry_run_changes_nothing(here: FakeMachine) -> None:
    files = content(here)
    prepared = prepare.prepare_apply(here, survey_of(here), Request(GIB), loader.Options())
    assert prepared.needed
    assert content(here) == files


# systemd-boot ----------------------------------------------------------------------------------------


def test_systemd_boot_bytes(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    files = content(machine)
    apply(machine)
    now = content(machine)
    name = f"boot/efi/loader/entries/{ID}-{RELEASE}.conf"
    line = f"options    {ROOT} systemd.machine_id={ID}"
    assert now[name].decode() == ENTRY.replace(line, f"{line} memmap=1G!4G")
    assert now["etc/kernel/cmdline"].decode() == f"{ROOT} memmap=1G!4G\n"
    for other in (f"{OTHER}-1", "windows"):
        path = f"boot/efi/loader/entries/{other}.conf"
        assert now[path] == files[path]
    remove(machine)
    assert content(machine) == files


def test_without_a_cmdline_file_new_kernels_get_one_and_it_goes_again(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    (machine.root / "etc/kernel/cmdline").unlink()
    apply(machine)
    # what kernel-install adds by itself is not in it
    assert content(machine)["etc/kernel/cmdline"].decode() == f"{ROOT} memmap=1G!4G\n"
    remove(machine)
    assert "etc/kernel/cmdline" not in content(machine)


def test_the_vendors_cmdline_is_the_model(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    (machine.root / "etc/kernel/cmdline").unlink()
    put(machine, "/usr/lib/kernel/cmdline", "root=LABEL=x vendor\n")
    apply(machine)
    assert content(machine)["etc/kernel/cmdline"] == b"root=LABEL=x vendor memmap=1G!4G\n"


def test_a_cmdline_that_was_there_is_never_deleted(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    (machine.root / "etc/kernel/cmdline").unlink()
    apply(machine)
    put(machine, "/etc/kernel/cmdline", f"{ROOT} mine memmap=1G!4G\n")
    remove(machine)
    assert content(machine)["etc/kernel/cmdline"].decode() == f"{ROOT} mine\n"


def test_a_made_cmdline_stays_while_this_boot_has_the_reservation(tmp_path: Path) -> None:
    """Without it a kernel that is installed before the reboot would take the words of /proc/cmdline."""
    machine = systemd_boot(tmp_path)
    (machine.root / "etc/kernel/cmdline").unlink()
    apply(machine)
    put(machine, "/proc/cmdline", f"{ROOT} systemd.machine_id={ID} memmap=1G!4G\n")
    remove(machine)
    assert content(machine)["etc/kernel/cmdline"].decode() == f"{ROOT}\n"


def test_comments_and_lines_of_the_cmdline_file(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    text = f"# root\n{ROOT}\n  # memmap=9G!9G\nconsole=ttyS0\n# the end\n"
    put(machine, "/etc/kernel/cmdline", text)
    apply(machine)
    wanted = text.replace("ttyS0", "ttyS0 memmap=1G!4G")
    assert content(machine)["etc/kernel/cmdline"].decode() == wanted
    remove(machine)
    assert content(machine)["etc/kernel/cmdline"].decode() == text


def test_entries_with_boot_counting(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    folder = machine.root / "boot/efi/loader/entries"
    (folder / f"{ID}-{RELEASE}.conf").rename(folder / f"{ID}-{RELEASE}+2-1.conf")
    efi(machine, "LoaderEntrySelected", f"{ID}-{RELEASE}.conf")
    apply(machine)
    assert "memmap=1G!4G" in lines(machine)[f"{ID}-{RELEASE}"]


def test_cmdline_d_is_left_alone(tmp_path: Path) -> None:
    """sdbootutil joins it and /etc/kernel/cmdline; kernel-install's plug-ins do not read it (systemd issue 23308)."""
    machine = systemd_boot(tmp_path)
    put(machine, "/etc/kernel/cmdline.d/10-console.cfg", "console=ttyS0\n")
    put(machine, "/etc/kernel/cmdline.d/zz-emupmem.cfg", "memmap=2G!4G\n")  # of a former emupmem
    apply(machine)
    assert machine.names("/etc/kernel/cmdline.d") == ["10-console.cfg"]
    assert content(machine)["etc/kernel/cmdline"].decode() == f"{ROOT} memmap=1G!4G\n"
    remove(machine)
    put(machine, "/etc/kernel/cmdline.d/20.cfg", "memmap=1G!8G\n")
    with pytest.raises(EmupmemError, match=r"20\.cfg reserves memory already"):
        apply(machine)


def test_entries_written_by_hand_are_known_by_their_root(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    for name in machine.names("/boot/efi/loader/entries"):
        (machine.root / "boot/efi/loader/entries" / name).unlink()
    (machine.root / "etc/kernel/cmdline").unlink()
    (machine.root / "sbin/kernel-install").unlink()
    put(
        machine, "/boot/loader/entries/arch.conf", f"title Arch\r\nlinux /vmlinuz-linux\r\noptions {ROOT}\r\n"
    )
    put(machine, "/boot/loader/entries/other.conf", "title Other\nlinux /v\noptions root=LABEL=other\n")
    apply(machine)
    now = content(machine)
    assert now["boot/loader/entries/arch.conf"].endswith(f"options {ROOT} memmap=1G!4G\r\n".encode())
    assert b"memmap" not in now["boot/loader/entries/other.conf"]
    assert "etc/kernel/cmdline" not in now


def test_a_unified_image_is_refused(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    efi(machine, "StubInfo", "systemd-stub 257")
    with pytest.raises(EmupmemError, match="its command line is built into it"):
        obstacles.refuse_machine(machine)


def test_a_unified_image_is_known_by_the_chosen_entry(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    efi(machine, "LoaderEntrySelected", "debian-6.12.efi")
    with pytest.raises(EmupmemError, match="its command line is built into it"):
        obstacles.refuse_machine(machine)


@pytest.mark.parametrize("selected", [f"{ID}-6.1.0-9.conf", f"{ID}-{RELEASE}.conf"])
def test_the_default_entry_is_the_one_that_started_this_boot(tmp_path: Path, selected: str) -> None:
    machine = systemd_boot(tmp_path)
    efi(machine, "LoaderEntrySelected", selected)
    standing = boot_systemd_boot.SystemdBoot().standing(machine)
    assert standing.default is not None
    assert standing.default.ids == (selected.removesuffix(".conf"),)


def test_bootctl_has_the_last_word_on_the_default(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    listed = f'[{{"id":"x.conf"}},{{"id":"{ID}-6.1.0-9.conf","isDefault":true}}]'
    script(machine, "bootctl", f"#!/bin/sh\necho '{listed}'\n")
    standing = boot_systemd_boot.SystemdBoot().standing(machine)
    assert standing.default is not None
    assert standing.default.release == "6.1.0-9"
    for rubbish in ("", "[", "{}", "[1]", '[{"isDefault":true}]'):
        script(machine, "bootctl", f"#!/bin/sh\necho '{rubbish}'\n")
        assert boot_systemd_boot.SystemdBoot().standing(machine).default is not None


def test_a_line_that_gets_too_long_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    put(machine, "/etc/kernel/cmdline", f"{ROOT} {'x' * 2030}\n")
    files = content(machine)
    with pytest.raises(EmupmemError, match="longer than the 2047 bytes"):
        apply(machine)
    assert content(machine) == files


def test_half_of_the_entries_is_finished(tmp_path: Path) -> None:
    """As after a power cut: one entry has it, the others and the source have not."""
    machine = systemd_boot(tmp_path)
    name = f"/boot/efi/loader/entries/{ID}-{RELEASE}.conf"
    put(machine, name, bls_text.rework_entry(ENTRY, ["1G!4G"]))
    put(machine, "/boot/efi/loader/entries/.x.conf.emupmem-new", "half")
    apply(machine)
    ours = [line for entry, line in lines(machine).items() if "(other)" not in entry]
    assert all(line.endswith("memmap=1G!4G") for line in ours)
    remove(machine)
    assert not any("memmap" in line for line in lines(machine).values())


def test_an_edit_meanwhile_is_respected(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    put(machine, "/etc/kernel/cmdline", "root=LABEL=new\n")
    files = content(machine)
    with pytest.raises(EmupmemError, match="was changed by another program in the meantime"):
        transaction.carry_out_change(machine, prepared)
    assert content(machine) == files


def test_a_tree_is_edited_without_running_anything(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    script(machine, "bootctl", "#!/bin/sh\ntouch /nonexistent/never\n")
    machine.live = False
    prepared = prepare.prepare_apply(machine, _planned(machine), Request(GIB), loader.Options())
    transaction.carry_out_change(machine, prepared)
    assert "memmap=1G!4G" in lines(machine)[f"{ID}-{RELEASE}"]


def _planned(machine: FakeMachine) -> survey.Survey:
    from emupmem.parser.bootlog import parse_boot_log

    log = parse_boot_log(fake.LOG.encode(), "log")
    assert log.firmware is not None
    return survey.Survey(Situation(log.firmware, (), (), None, True, None), "log")


# grubby ----------------------------------------------------------------------------------------------


def test_grubby_is_given_the_whole_merged_list(tmp_path: Path) -> None:
    machine = fedora(tmp_path, f"{ROOT} memmap=64K#0x1000")
    put(machine, "/etc/kernel/cmdline", f"{ROOT} memmap=64K#0x1000\n")
    apply(machine)
    for line in lines(machine).values():
        items = [i.text for i in parse_command_line(line).items]
        assert items == ["64K#0x1000", "1G!4G"]
    assert 'GRUB_CMDLINE_LINUX="memmap=1G!4G"' in content(machine)["etc/default/grub"].decode()
    remove(machine)
    for line in lines(machine).values():
        assert [i.text for i in parse_command_line(line).items] == ["64K#0x1000"]


@pytest.mark.parametrize("word", ["memmap=64K\\$0x1000", "a=b&c", 'acpi_osi="Windows 2012"', "x=*"])
def test_words_that_grubby_would_mangle_are_refused(tmp_path: Path, word: str) -> None:
    machine = fedora(tmp_path, f"{ROOT} {word}")
    files = content(machine)
    with pytest.raises(EmupmemError):
        apply(machine)
    assert content(machine) == files


def test_entries_that_differ_are_not_made_the_same(tmp_path: Path) -> None:
    machine = fedora(tmp_path)
    put(
        machine,
        f"/boot/loader/entries/{ID}-0-rescue.conf",
        FEDORA.replace("OPTIONS", f"{ROOT} memmap=1M#16M"),
    )
    with pytest.raises(EmupmemError, match="differ in their memmap="):
        apply(machine)


def test_grubby_missing(tmp_path: Path) -> None:
    machine = fedora(tmp_path)
    (machine.root / "sbin/grubby").unlink()
    with pytest.raises(EmupmemError, match="grubby is not installed"):
        obstacles.refuse_machine(machine)


BROKEN = {
    "fails": "sys.exit('grubby: disk full')",
    "does nothing": "sys.exit()",
    "drops other words": "update = lambda line: 'root=UUID=0 ' + ' '.join(add)",
    "loses an entry": "sorted((root / 'boot/loader/entries').glob('*.conf'))[0].unlink()",
    "loses the reservation": "add = []",
    "makes a limit of it": "add = ['memmap=1G']",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("options", [ROOT, "$kernelopts"])
def test_a_grubby_that_does_otherwise_is_rolled_back(tmp_path: Path, how: str, options: str) -> None:
    machine = fedora(tmp_path, options, env=f"kernelopts={ROOT}\n" if "$" in options else "")
    files = content(machine)
    text = GRUBBY.replace("env = root", f"{BROKEN[how]}\nenv = root", 1)
    program(machine, "grubby", text, QUIET=False, OLD=False)
    with pytest.raises(EmupmemError) as caught:
        apply(machine)
    assert "the old configuration is back" in caught.value.hint
    assert content(machine) == files


# sdbootutil ------------------------------------------------------------------------------------------


def adds_kernel(machine: FakeMachine, release: str) -> str:
    """A kernel is installed as its package's script does it; the words of its entry."""
    done = machine.output("sdbootutil", "add-kernel", release)
    assert done is not None
    assert done.status == 0, done
    return bls_text.options(machine.peek(f"/boot/efi/loader/entries/opensuse-{release}-5.conf"))


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False])
def test_a_new_kernel_of_opensuse_carries_it_and_after_remove_none_does(new: bool, tmp_path: Path) -> None:
    machine, other = opensuse(tmp_path / "a", new=new), opensuse(tmp_path / "b", new=new)
    line = content(machine)["etc/kernel/cmdline"].decode().strip()
    put(machine, "/fail", "half")
    with pytest.raises(EmupmemError):
        apply(machine)
    (machine.root / "fail").unlink()
    assert content(machine) == content(other)
    assert adds_kernel(machine, "7.0.1-1") == adds_kernel(other, "7.0.1-1") == line
    apply(machine)
    assert adds_kernel(machine, "7.1.0-1") == f"{line} memmap=1G!4G"
    remove(machine)
    assert adds_kernel(machine, "7.2.0-1") == line
    for release in ("7.1.0-1", "7.2.0-1"):
        adds_kernel(other, release)
    assert content(machine) == content(other)


def test_other_snapshots_keep_their_words(tmp_path: Path) -> None:
    machine = opensuse(tmp_path)
    apply(machine)
    found = lines(machine)
    assert "memmap=1G!4G" in found[f"opensuse-{RELEASE}-5"]
    assert "memmap" not in found[f"opensuse-{RELEASE}-4 (other)"]


@pytest.mark.parametrize("by", ["bootctl", "loader.conf"])
def test_another_snapshot_that_starts_next_is_told_before_anything_is_changed(
    tmp_path: Path, by: str
) -> None:
    """As after `snapper rollback`: the entries of this snapshot are not those that boot."""
    machine = opensuse(tmp_path)
    name = f"opensuse-{RELEASE}-4.conf"
    if by == "bootctl":
        script(machine, "bootctl", f"""#!/bin/sh\necho '[{{"id":"{name}","isDefault":true}}]'\n""")
    else:
        put(machine, "/boot/efi/loader/loader.conf", f"default {name}\n")
    files = content(machine)
    with pytest.raises(
        EmupmemError, match=rf"the next start is another snapshot \({re.escape(name)}\)"
    ) as caught:
        obstacles.refuse_machine(machine)
    assert "reboot into it first" in caught.value.hint
    assert content(machine) == files


DEFAULTS = """#!/bin/sh\necho '[{"id":"%s","isDefault":true}]'\n"""


@pytest.mark.parametrize("by", ["bootctl", "loader.conf"])
def test_a_default_that_is_started_as_a_program_is_told_before_anything_is_changed(
    tmp_path: Path, by: str
) -> None:
    machine = systemd_boot(tmp_path)
    put(
        machine,
        "/boot/efi/loader/entries/arch.conf",
        f"title Arch\nefi /vmlinuz-linux\noptions {ROOT} initrd=\\initramfs.img\n",
    )
    if by == "bootctl":
        script(machine, "bootctl", DEFAULTS % "arch.conf")
    else:
        put(machine, "/boot/efi/loader/loader.conf", "default arch.conf\n")
    with pytest.raises(EmupmemError, match=r"arch\.conf, which starts a kernel by “efi”") as caught:
        obstacles.refuse_machine(machine)
    assert "bootctl set-default" in caught.value.hint


@pytest.mark.parametrize("other", ["windows.conf", "auto-windows", "fedora.conf"])
def test_a_default_of_another_system_is_told(tmp_path: Path, other: str) -> None:
    machine = systemd_boot(tmp_path)
    put(machine, "/boot/efi/loader/entries/windows.conf", "title Windows\nefi /EFI/Microsoft/x.efi\n")
    put(machine, "/boot/efi/loader/entries/fedora.conf", "title F\nlinux /v\noptions root=UUID=9\n")
    assert obstacles.refuse_machine(machine) == ()
    script(machine, "bootctl", DEFAULTS % other)
    (told,) = obstacles.refuse_machine(machine)
    assert told == f"the next start is {other}, which is not changed: choose this system in the boot menu"
    script(machine, "bootctl", DEFAULTS % f"{ID}-{RELEASE}+2-1.conf")
    assert obstacles.refuse_machine(machine) == ()


def test_the_end_of_an_entry_s_name_is_in_any_case(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    folder = machine.root / "boot/efi/loader/entries"
    (folder / f"{ID}-{RELEASE}.conf").rename(folder / f"{ID}-{RELEASE}.CONF")
    script(machine, "bootctl", DEFAULTS % f"{ID}-{RELEASE}.conf")
    assert obstacles.refuse_machine(machine) == ()
    apply(machine)
    assert "memmap=1G!4G" in machine.text(f"/boot/efi/loader/entries/{ID}-{RELEASE}.CONF")


def test_a_tree_of_opensuse_names_its_own_command(tmp_path: Path) -> None:
    machine = opensuse(tmp_path)
    (machine.root / "usr/bin").mkdir(parents=True)
    (machine.root / "sbin/sdbootutil").rename(machine.root / "usr/bin/sdbootutil")
    put(machine, "/boot/efi/loader/loader.conf", f"default opensuse-{RELEASE}-5.conf\n")
    files = content(machine)
    machine.live = False
    prepared = prepare.prepare_apply(machine, _planned(machine), Request(GIB), loader.Options())
    there = prepared.by.to_run_there(machine)
    assert there is not None
    assert there.argv == ("sdbootutil", "update-all-entries")
    transaction.carry_out_change(machine, prepared)
    assert "memmap=1G!4G" in lines(machine)[f"opensuse-{RELEASE}-5"]
    assert "memmap" not in lines(machine)[f"opensuse-{RELEASE}-4 (other)"]
    remove(machine)
    assert content(machine) == files


def test_an_sdbootutil_that_fails_is_rolled_back(tmp_path: Path) -> None:
    machine = opensuse(tmp_path)
    files = content(machine)
    put(machine, "/fail", "start")
    with pytest.raises(
        EmupmemError, match=r"sdbootutil failed with status 1: Error: no space left"
    ) as caught:
        apply(machine)
    assert "the old configuration is back" in caught.value.hint
    assert content(machine) == files


# rpm-ostree ------------------------------------------------------------------------------------------


def test_rpm_ostree_is_told_only_what_differs(tmp_path: Path) -> None:
    machine = ostree(tmp_path)
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    (command,) = prepared.steps.commands
    assert command.argv == ("rpm-ostree", "kargs", "--append=memmap=1G!4G")
    transaction.carry_out_change(machine, prepared)
    prepared = prepare.prepare_apply(
        machine, survey_of(machine), Request(2 * GIB), loader.Options(replace=True)
    )
    (command,) = prepared.steps.commands
    assert command.argv == ("rpm-ostree", "kargs", "--delete=memmap=1G!4G", "--append=memmap=2G!4G")


def test_an_rpm_ostree_that_fails_late_is_taken_back(tmp_path: Path) -> None:
    machine = ostree(tmp_path)
    before = lines(machine)
    text = RPM_OSTREE.replace("if (pathlib", "if any('append' in a for a in sys.argv) and (pathlib")
    program(machine, "rpm-ostree", text, HEAD="")
    put(machine, "/fail", "")
    with pytest.raises(EmupmemError, match="rpm-ostree failed with status 1: error: while staging"):
        apply(machine)
    after = lines(machine)
    assert {n: sorted(v.split()) for n, v in after.items()} == {
        n: sorted(v.split()) for n, v in before.items()
    }


def test_ostree_without_its_program(tmp_path: Path) -> None:
    machine = ostree(tmp_path)
    (machine.root / "sbin/rpm-ostree").unlink()
    with pytest.raises(EmupmemError, match="an ostree system without rpm-ostree"):
        obstacles.refuse_machine(machine)


def test_the_tree_of_an_ostree_system_is_refused(tmp_path: Path) -> None:
    machine = ostree(tmp_path)
    put(machine, "/ostree/repo/config", "")
    machine.live = False
    with pytest.raises(EmupmemError, match="the tree of an ostree system"):
        obstacles.refuse_machine(machine)


# Elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_archive_tells_the_same_without_the_machines_id(here: FakeMachine) -> None:
    from emupmem.doctor import look
    from emupmem.report import collected, gather

    masked = gather.gather_machine(here).archive
    assert not any(ID in name or ID.encode() in data for name, data in masked.members.items())
    there = collected.Collected(masked)
    assert type(detect.of(there)) is type(detect.of(here))
    before = [line for name, line in lines(here).items() if "(other)" not in name]
    other = detect.of(there)
    after = [e.text for e in other.standing(there).entries if e.ours]
    assert len(after) == len(before)
    said = {f.name: (f.status, f.evidence.replace(ID, "")) for f in look.findings_of(here)}
    told = {f.name: (f.status, re.sub(r"0{20}\d+", "", f.evidence)) for f in look.findings_of(there)}
    for name in ("loader", "kernel", "regions", "randomisation"):
        assert told[name] == said[name]


# A trial -----------------------------------------------------------------------------------------------


def test_where_the_loader_cannot_forget_a_trial_it_is_refused_or_said(here: FakeMachine) -> None:
    if isinstance(detect.of(here), rpm_ostree.RpmOstree):
        begun = prepare.prepare_trial(here, survey_of(here), Request(GIB), loader.Options())
        assert any("a start that hangs comes again" in w for w in begun.warnings)
        return
    refused = (
        "a trial is not known for|the boot loader does not say|GRUB could not forget the trial by itself"
    )
    with pytest.raises(EmupmemError, match=refused):
        prepare.prepare_trial(here, survey_of(here), Request(GIB), loader.Options())
