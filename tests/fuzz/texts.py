# SPDX-License-Identifier: Apache-2.0
"""Where mutation begins: our own fixtures, and the words of each language.

EMUPMEM_CORPUS may name a folder with files of other people (`e820/`, `grub/`): they are seeds too, but then
nothing of what is found is kept in the repository.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from tests import FIXTURES

FOREIGN = os.environ.get("EMUPMEM_CORPUS", "")


def _excerpt(data: bytes, most: int = 5000) -> bytes:
    """The beginning of a log up to a little behind the map, cut at a line."""
    last = data.find(b"BIOS-e820")
    begin = max(0, data.rfind(b"\n", 0, max(0, last - 900)) + 1)
    return data[begin : begin + most].rpartition(b"\n")[0] + b"\n"


def _logs() -> list[bytes]:
    folders = ("6.1-bios", "6.12-uefi-memmap", "7.2-bios-memmap", "7.2-bios-numa", "6.12-bios-misaligned")
    files = [FIXTURES / "boot" / name / "dmesg" for name in folders]
    files += sorted((FIXTURES / "boot" / "decorated").glob("*.log"))
    seeds = [_excerpt(file.read_bytes()) for file in files if file.is_file()]
    seeds.append(
        b"Linux version 2.6.32-5-amd64 (a@b) #1 SMP\nCommand line: root=/dev/sda1 ro mem=4G\n"
        b"BIOS-provided physical RAM map:\n BIOS-e820: 0000000000000000 - 000000000009fc00 (usable)\n"
        b" BIOS-e820: 000000000009fc00 - 00000000000a0000 (reserved)\n"
        b" BIOS-e820: 0000000000100000 - 0000000080000000 (usable)\n"
        b" BIOS-e820: 0000000100000000 - 0000000480000000 (usable)\nNX active\n"
        b"SRAT: Node 0 PXM 0 0-80000000\nSRAT: Node 1 PXM 1 100000000-480000000\n"
    )
    seeds.append(
        b"Linux version 7.2.0 (a@b) #1 SMP\nBIOS-provided physical RAM map:\n"
        b"BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff]  639 KB System RAM\n"
        b"BIOS-e820: [gap 0x000000000009fc00-0x00000000000fffff]  385 KB ...\n"
        b"BIOS-e820: [mem 0x0000000000100000-0x000000053fffffff]   20 GB System RAM\nNX active\n"
    )
    return seeds


LOGS = _logs()


@cache
def fixtures(kind: str) -> list[bytes]:
    """The seeds of a kind: grub, tables, cmdline, entry, unit."""
    boot = sorted((FIXTURES / "boot").iterdir())
    if kind == "grub":
        return [f.read_bytes() for f in sorted((FIXTURES / "grub").iterdir()) if f.is_file()] + foreign(
            "grub"
        )
    if kind == "tables":
        seeds = [b"iomem\n" + (f / "iomem").read_bytes()[:2500] for f in boot if (f / "iomem").is_file()]
        maps = [(f / "memmap").read_text().splitlines() for f in boot if (f / "memmap").is_file()]
        seeds += [
            b"sysfs memmap=1G!4G\n" + "\n".join("|".join(x.split(maxsplit=2)) for x in m).encode()
            for m in maps
        ]
        return seeds + [b"kernel Ubuntu 6.8.0-60.63-generic 6.8.12\n" + (f / "version").read_bytes()
                        for f in boot if (f / "version").is_file()]  # fmt: skip
    if kind == "cmdline":
        return [(f / "cmdline").read_bytes() for f in boot if (f / "cmdline").is_file()] + [
            b'dyndbg="file a +p" memmap=4G!12G,64K$0x1869,2M#3M,4G@1G,1M%1G-1+7 mem=8G -- memmap=1G!1G',
            b"hugepagesz=1G hugepages=4 default_hugepagesz=2M hugepages=0:2,1:3 nokaslr crashkernel=256M,high",
            b"memmap=exactmap memmap=0x9fc00@0 memmap=010G@1M mem=nopentium movablecore=2G",
        ]
    if kind == "entry":
        text = "\n".join(w.decode() for w in (*_ENTRY[:4], *_ENTRY[6:8]))
        head = "set 1G!4G 2G!8G +nokaslr -quiet\n"
        line = "root=UUID=0 ro quiet memmap=1G!4G\n"
        return [
            f"{h}{t}".encode()
            for h in (head, "remove\n")
            for t in (f"{text}\n", line, f"# c\n{line}{line}", "")
        ]
    from emupmem.device import unit

    mount = unit.BootMount(4 << 30, 1 << 30, "/mnt/pmem0", "ext4", "alice", "0755", "")
    return [unit.unit_text([mount], "/usr/local/bin/emupmem").encode()]


def foreign(kind: str) -> list[bytes]:
    """Files of other people, where EMUPMEM_CORPUS names some."""
    files = sorted(Path(FOREIGN, kind).iterdir()) if FOREIGN else []
    data = [f.read_bytes() for f in files if f.is_file() and f.suffix not in (".json", ".tsv", ".md")]
    return [_excerpt(d) for d in data] if kind == "e820" else [d[:3000] for d in data]


LOGS += foreign("e820")


def _words(text: str) -> list[bytes]:
    return [w.encode() for w in re.split(r"\s*\n\s*", text.strip())]


_LOG = _words(
    """
    BIOS-e820:
    BIOS-88:
    BIOS-e801:
    Xen:
    user:
    extended:
    modified:
    BIOS-provided physical RAM map:
    user-defined physical RAM map:
    extended physical RAM map:
    modified physical RAM map:
    [mem 0x0000000000000000-0x000000000009fbff] usable
    [mem 0x0000000100000000-0x000000053fffffff] usable
    [mem 0x0000000540000000-0x000000063fffffff] persistent (type 12)
    [mem 0x0000000540000000-0x000000063fffffff] device reserved
    [gap 0x00000000000a0000-0x00000000000fffff]
    [gap 0x00000000000a0000-0x00000000000fffff]  384 KB ...
    0000000000000000 - 000000000009fc00 (usable)
    0000000100000000 - 0000000480000000 type 20
    ACPI data
    ACPI NVS
    System RAM
    soft reserved
    type 1
    Linux version 6.1.0-32-amd64 (a@b) #1 SMP Debian 6.1.129-1
    Command line: root=/dev/vda1 memmap=1G!4G
    Kernel command line: root=/dev/vda1 memmap=1G!4G \\
    Kernel command line: ro>
    Inode-cache hash table entries: 1048576
    SRAT: Node 0 PXM 0 [mem 0x00000000-0x7fffffff]
    SRAT: Node 1 PXM 1 [mem 0x100000000-0x53fffffff] hotplug
    efi: EFI v2.7 by Debian
    DMI: QEMU
    last_pfn = 0x540000
    Hypervisor detected: Xen PV
    nd_pmem namespace0.0: misaligned, unable to map
    probe of namespace0.0 failed with error -95
    e820: too many entries; ignoring [mem 0x540000000-0x63fffffff]
    Nov 24 03:49:02 host kernel:
    2026-11-24T03:49:02.537595+00:00 host kernel: [    0.000000]
    [    0.000000]
    [Tue Nov 24 03:49:02 2026]
    <6>[    0.000000]
    6,12,0,-;
    kern  :info  : [    0.000000]
    {"MESSAGE":"BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable"}
    "MESSAGE" : "Linux version 6.1 \\ud800"
    \\x1b[0m
    00000000-0009fbff : System RAM
      01000000-01ffffff : Kernel code
    100000000-53fffffff : Persistent Memory (legacy)
    """
)
_CMDLINE = _words(
    """
    memmap=1G!4G
    memmap=0x40000000!0x100000000
    memmap=64K$0x18690000
    memmap=2M#3M
    memmap=4G@1G
    memmap=1M%1G-1+7
    memmap=exactmap
    memmap=8G
    mem=4G
    mem=nopentium
    hugepages=4
    hugepagesz=1G
    default_hugepagesz=2M
    hugepages=0:2,1:3
    crashkernel=256M,high
    crashkernel=1G-4G:128M,4G-:256M@16M
    nokaslr
    --
    "quoted word"
    dyndbg="file a +p"
    mem_map=
    ,1G!8G
    !
    @
    0x
    010G
    1E!1E
    """
)
_GRUB = _words(
    r"""
    GRUB_CMDLINE_LINUX=
    GRUB_CMDLINE_LINUX_DEFAULT=
    GRUB_CMDLINE_LINUX+=
    export GRUB_CMDLINE_LINUX
    readonly GRUB_CMDLINE_LINUX
    unset GRUB_CMDLINE_LINUX
    GRUB_CMDLINE_LINUX="quiet splash"
    GRUB_CMDLINE_LINUX='memmap=1G!4G'
    GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=1G!4G"
    GRUB_CMDLINE_LINUX_DEFAULT="${GRUB_CMDLINE_LINUX} quiet"
    GRUB_CMDLINE_LINUX_RECOVERY="single $GRUB_CMDLINE_LINUX"
    # added by emupmem
    memmap=1G!4G
    memmap=1G!4G,2G!8G
    memmap=64K\\\$0x1869,1G!4G
    memmap=2G@1M
    nokaslr
    quiet
    ${X:-a b}
    $(echo x)
    $((1+1))
    `echo x`
    ${GRUB_CMDLINE_LINUX:+x}
    ${GRUB_CMDLINE_LINUX#a}
    acpi_osi=\"!Windows 2012\"
    if [ -n "$X" ]; then
    fi
    case $X in a) ;; esac
    for i in 1 2; do
    done
    f() {
    }
    cat <<EOF
    EOF
    cat <<'E'
    && A=1
    || B=2
    ; C=3
    # comment 'with quote
    "a"#b
    'a'"b"c
    \
    {
    (
    )
    set -e
    set -u
    eval "GRUB_CMDLINE_LINUX=x"
    : "${GRUB_CMDLINE_LINUX:=y}"
    shift
    return
    IFS=,
    alias quiet=x
    local x=1
    trap
    """
)
_MENU = _words(
    r"""
    menuentry 'Debian' --class debian $menuentry_id_option 'gnulinux-simple-0' {
    submenu 'Advanced' --id=adv {
    }
    {
    linux	/boot/vmlinuz-6.1.0-32-amd64 root=UUID=0 ro memmap=1G!4G
    linux16 /vmlinuz
    linuxefi /usr/lib/modules/6.1/vmlinuz single
    initrd /boot/initrd.img
    set default="0"
    set default="${saved_entry}"
    set default="${next_entry}"
    set lang=de_DE
    set lang=C
    blscfg
    ### BEGIN /etc/grub.d/10_linux ###
    ### END /etc/grub.d/10_linux ###
    ### BEGIN
    if [ "${next_entry}" ] ; then
    fi
    \"
    "a b"
    'a>b'
    -recovery-
    saved_entry=gnulinux>1
    memmap=1G\!4G
    memmap=64K$0x1
    """
)
_ENTRY = _words(
    """
    title Debian GNU/Linux
    version 6.12.0-1-amd64
    machine-id 0f1e2d3c4b5a69788796a5b4c3d2e1f0
    options root=UUID=0 ro quiet memmap=1G!4G
    options $kernelopts $tuned_params
    options
    linux /debian/6.12.0-1-amd64/linux
    initrd /debian/6.12.0-1-amd64/initrd.img
    grub_users $grub_users
    # comment
    memmap="1G!4G"
    "memmap=1G!4G"
    memmap=1G!4G,2G@1G,2G!8G
    "a b
    ${kernelopts}
    à
    """
)
_ARCHIVE = _words(
    """
    @facts
    @-tree/proc/iomem
    @tree/proc/cmdline
    @tree/proc/meminfo
    @tree/proc/swaps
    @tree/proc/stat
    @tree/proc/version
    @tree/proc/self/mountinfo
    @tree/proc/modules
    @tree/sys/power/state
    @tree/sys/power/disk
    @tree/sys/kernel/security/lockdown
    @tree/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
    @tree/sys/firmware/memmap/0/start
    @tree/sys/firmware/memmap/7/end
    @tree/sys/firmware/memmap/1/type
    @tree/sys/firmware/memmap/x/type
    @tree/sys/firmware/efi/fw_platform_size
    @tree/sys/bus/nd/devices/namespace0.0/size
    @tree/sys/dev/block/8:1/dm/uuid
    @tree/sys/dev/block/8:1/slaves/sda1/dev
    @tree/etc/default/grub
    @tree/etc/default/grub.d/50-cloud.cfg
    @tree/etc/systemd/system/emupmem.service
    @tree/etc/modprobe.d/a.conf
    @tree/etc/fstab
    @tree/boot/grub/grub.cfg
    @tree/boot/grub/grubenv
    @tree/run/systemd/container
    @tree/boot/loader/entries/a.conf
    @tree/efi/loader/entries/0f1e2d3c4b5a69788796a5b4c3d2e1f0-6.12.conf
    @tree/etc/kernel/cmdline
    @tree/etc/kernel/cmdline.d/a.conf
    @tree/etc/kernel/entry-token
    @tree/etc/machine-id
    @tree/etc/os-release
    @commands/dmesg
    @commands/journalctl-b
    @doctor.json
    @tree
    @tree/..
    {"nodes": [{"node": 0, "start": 0, "end": 4294967296}]}
    {"room": {"/boot": -1}}
    {"there": ["/sys/firmware/efi", ""]}
    {"outputs": {"dmesg": {"member": "commands/dmesg", "status": 1, "said": ""}}}
    {"sourced": {"values": [], "complaints": [], "failed": "x"}}
    {"sourced": {"error": "x"}}
    {"modified": {"/boot/grub/grub.cfg": null}}
    {"regions": [{"name": "region0", "size": 1, "start": null, "block": "", "block_size": 0, "dax": null}]}
    {"format": 2}
    {"root": false, "architecture": "aarch64"}
    null
    true
    []
    MemTotal: 16 kB
    blacklist nd_pmem
    install nd_e820 /bin/false
    36 35 254:0 / /boot rw shared:1 - ext4 /dev/mapper/x rw
    37 35 259:0 / /mnt rw - ext4 /dev/pmem0 rw,dax=always
    [none] integrity confidentiality
    saved_entry=0
    btime 1
    """
)
_TAR = [b"\x1f\x8b\x08\0", b"ustar\x0000", b"ustar  \0", b"emupmem.json", b"tree/", b"commands/", b"30 path=tree/x\n",
        b"0", b"x", b"g", b"L", b"K", b"S", b"2", b"5", b"22 GNU.sparse.major=1\n", b"25 size=99999999999999\n",
        b"\x80\0\0\0\0\0\0\0\0\0\0\x01", b"\xff" * 12, bytes(512), b"11 size=-1\n", b"GNU.sparse.size=1\n",
        b"./././@LongLink", b"mtime=1e400\n", b"hdrcharset=BINARY\n"]  # fmt: skip
_MASK = _words(
    """
    thinkbox
    THINKBOX.lan
    thinkbox--vg
    /home/mallory/
    root=UUID=3f1b7d52-9c0e-4a5d-8a77-0123456789ab
    PARTUUID=9f8e7d6c-02
    52:54:00:ab:cd:ef
    192.168.17.23
    fd00:1234::17
    ip=10.0.0.1::10.1.1.1:255.255.255.0:thinkbox:eth0:off
    rd.password=hunter22
    password_pbkdf2 boss grub.pbkdf2.sha512.10000.AB
    password guest hunter22
    superusers="a,b"
    --users boss
    SerialNumber: 0123ABCD
    DMI: ACME Thunder
    Hostname set to <thinkbox>.
    search --no-floppy --fs-uuid --set=root A1B2-C3D4
    by-id/ata-ACME
    netroot=iscsi:
    host=a, domain=b, nis-domain=(none)
    memmap=1G!4G
    0f1e2d3c4b5a69788796a5b4c3d2e1f0
    Linux version 6.1 (mallory@thinkbox)
    """
)
TOKENS: dict[str, list[bytes]] = {
    "log": [*_LOG, *_CMDLINE[:6]],
    "cmdline": _CMDLINE,
    "grub": [*_GRUB, *_CMDLINE[:8]],
    "menu": [*_MENU, *_CMDLINE[:8]],
    "entry": _ENTRY,
    "archive": [*_ARCHIVE, *_LOG[:20], *_CMDLINE, *_MENU, *_ENTRY],
    "tar": _TAR,
    "mask": _MASK,
}
