# SPDX-License-Identifier: Apache-2.0
"""QEMU for a guest that has none: this host's program with all it loads, in one folder.

A guest inside a guest, both without hardware virtualisation, needs minutes. With the virtualisation that QEMU
emulates for the outer one it needs ten seconds, where that works: in QEMU 7.2, 10.0 and 11.1, not in 8.2.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.vm.image import image
from tests.vm.kernel import initramfs
from tests.vm.machine import acceleration, run

PROGRAM = "qemu-system-x86_64"
FIRMWARE = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin")
SHARED = (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
LOADER = "ld-linux-x86-64.so.2"

# Its own loader and libraries: the guest's may be older.
WRAPPER = f"""#!/bin/sh
here=${{0%/*}}
export QEMU_MODULE_DIR=$here/modules
exec $here/lib/{LOADER} --library-path $here/lib $here/program -L $here/share "$@"
"""

# What a kernel can leave out that only has to find an NVDIMM.
CMDLINE = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check lpj=4000000 "
    "cryptomgr.notests apparmor=0 audit=0 ipv6.disable=1 random.trust_cpu=on "
    "initcall_blacklist=init_kprobe_trace,cubictcp_register,crypto_kdf108_init,load_system_certificate_list,init_ima,"
    "init_encrypted,ksm_init,snapshot_device_init,init_mmio_trace,blake2s_mod_init"
)

# QEMU that starts, opens what it is given, and waits: `started OUTPUT` waits for it, `$user` is its process.
IDLE = """
idle="-accel tcg -nodefaults -display none -S -monitor stdio"
mkfifo /run/monitor
exec 3<> /run/monitor
started() { until grep -q 'QEMU .* monitor' $1; do kill -0 $user; sleep 1; done; }
"""


def qemu_folder(target: Path) -> Path:
    """Put QEMU with all that it loads into `target`: there, `qemu` is the program."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise FileNotFoundError(f"{PROGRAM} is not installed (tests/vm/deps.sh)")
    for name in ("lib", "share", "modules"):
        (target / name).mkdir(parents=True)
    plugins = [p for p in Path("/usr/lib").glob("*/qemu/accel-tcg-x86_64.so") if p.is_file()]
    for file in (Path(program), *plugins):
        for library in re.findall(r"(/\S+)", run(["ldd", str(file)])):
            if Path(library).is_file():
                shutil.copy(library, target / "lib")
    for plugin in plugins:
        shutil.copy(plugin, target / "modules")
    for name in FIRMWARE:
        found = next(folder / name for folder in SHARED if (folder / name).exists())
        shutil.copy(found, target / "share")
    shutil.copy(program, target / "program")
    (target / "qemu").write_text(WRAPPER)
    (target / "qemu").chmod(0o755)
    return target


def nested_guest(suite: str, script: str, modules: tuple[str, ...], target: Path) -> Path:
    """Put QEMU, a kernel of the suite and an initramfs that runs a busybox script into `target`.

    There, `qemu` is the program, `kvm` and `tcg` its arguments for that guest: console and output of the script
    go to the files `console` and `output` of the working directory.
    """
    qemu_folder(target)
    made = image(suite)
    shutil.copy(made.kernel, target / "vmlinuz")
    shutil.copy(initramfs(made, target.parent, script, modules), target / "initramfs")
    common = (
        f"-m 256M -nodefaults -display none -no-reboot -kernel /job/{target.name}/vmlinuz "
        f"-initrd /job/{target.name}/initramfs -append '{CMDLINE}' -serial file:console -serial file:output"
    )
    (target / "kvm").write_text(f"-accel kvm -cpu host {common}\n")
    (target / "tcg").write_text(f"{' '.join(acceleration())} {common}\n")
    return target
