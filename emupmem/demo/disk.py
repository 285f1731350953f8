# SPDX-License-Identifier: Apache-2.0
"""The guest's disk, built by mmdebstrap and mke2fs and kept for the next time."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import emupmem
from emupmem.demo import recipe
from emupmem.demo.guest import DemoGuest
from emupmem.model import Command, EmupmemError
from emupmem.record import record
from emupmem.system.errors import write_hint
from emupmem.system.machine import Machine

HOUR = 3600.0
SECTORS = 2048
"""Where the root partition begins: GRUB's core lies before it."""

NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
}
"""The programs, and Debian's packages of them."""


@record
class Disk:
    """A folder with the disk and with the kernel that it boots."""

    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "disk.raw"

    @property
    def kernel(self) -> tuple[Path, Path]:
        """The kernel and its initramfs."""
        return self.folder / "vmlinuz", self.folder / "initrd"


def require_programs(machine: Machine) -> None:
    """Raise EmupmemError where something is missing that makes or runs the guest."""
    missing = [package for program, package in NEEDED.items() if machine.find(program) is None]
    if missing:
        raise EmupmemError(
            f"the demo needs {', '.join(missing)}", f"on Debian and Ubuntu: apt install {' '.join(missing)}"
        )


def demo_disk(machine: Machine, cache: Path, tell: Callable[[str], None]) -> Disk:
    """The disk of the recipe, from the cache or built anew: minutes. Raises EmupmemError."""
    place = cache / f"demo-{recipe.recipe_key()}"
    if place.is_dir():
        return Disk(place)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EmupmemError(f"{cache} cannot be a folder: {exc.strerror}", write_hint(exc)) from exc
    tell(f"making the guest's disk from Debian {recipe.SUITE}, kept in {cache} (minutes, once)")
    work = Path(tempfile.mkdtemp(prefix="demo-making-", dir=cache))
    try:
        made = Disk(work / "disk")
        made.folder.mkdir()
        _make_tree(machine, work, made)
        _make_image(machine, work, made)
        tell("installing GRUB on it, from within")
        guest = DemoGuest(made.image, job_disk(machine, work, f"set -e\n{recipe.INSTALL_LOADER}\n"))
        status = guest.boot(lambda text: None, from_outside=made.kernel)
        if status != 0:
            raise EmupmemError(f"the guest's GRUB cannot be installed: status {status}")
        made.folder.rename(place)
    finally:
        # Never through a mount: /dev of this machine may still be in the tree.
        machine.output("rm", "-rf", "--one-file-system", "--", str(work), timeout=HOUR)
    return Disk(place)


def copy_disk(machine: Machine, made: Disk, target: Path) -> None:
    """A copy for one run; holes stay holes. Raises EmupmemError."""
    _run(machine, "copy the disk", "cp", "--sparse=always", "--reflink=auto", str(made.image), str(target))


def job_disk(machine: Machine, work: Path, script: str) -> Path:
    """A second disk for one boot: the script, and this emupmem. Raises EmupmemError."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        tree = Path(name)
        source = Path(emupmem.__file__).parent
        shutil.copytree(source, tree / "src/emupmem", ignore=shutil.ignore_patterns("__pycache__"))
        (tree / "script").write_text(script)
        image = work / "job.raw"
        image.unlink(missing_ok=True)
        _run(
            machine,
            "make the disk with the script",
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-d",
            str(tree),
            str(image),
            "64M",
        )
    return image


def _make_tree(machine: Machine, work: Path, made: Disk) -> None:
    hook = work / "customize"
    lines = ["#!/bin/sh", "set -eu"]
    for name, text in recipe.FILES.items():
        target = f'"$1"/{name}'
        mode = "644" if name.endswith(".service") else "755"
        lines += [f"cat >{target} <<'END_OF_FILE'\n{text}END_OF_FILE", f"chmod {mode} {target}"]
    kernel, initrd = (shlex.quote(str(p)) for p in made.kernel)
    lines += ['chroot "$1" /var/tmp/setup >/dev/null', 'rm "$1"/var/tmp/setup', ': >"$1"/etc/machine-id']
    lines += [f'cp -L "$1"/boot/vmlinuz-* {kernel}', f'cp -L "$1"/boot/initrd.img-* {initrd}']
    hook.write_text("\n".join(lines) + "\n")
    hook.chmod(0o755)
    # In a mount namespace of its own: what it mounts in the tree is gone with it, however it ends.
    argv = [
        "unshare",
        "--mount",
        "mmdebstrap",
        "--mode=root",
        "--variant=apt",
        "--quiet",
        f"--include={','.join(recipe.PACKAGES)}",
    ]
    argv += ["--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/man/*"]
    argv += ["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/doc/*"]
    _run(
        machine,
        "make the guest's file tree",
        *argv,
        f"--customize-hook={hook}",
        recipe.SUITE,
        str(work / "tree"),
        recipe.MIRROR,
    )


def _make_image(machine: Machine, work: Path, made: Disk) -> None:
    with made.image.open("wb") as file:
        file.truncate(recipe.DISK_MIB << 20)
    table = work / "table"
    table.write_text(f"label: dos\nstart={SECTORS}, type=83, bootable\n")
    _run(
        machine, "divide the disk", "sh", "-c", 'exec sfdisk -q "$1" <"$2"', "sh", str(made.image), str(table)
    )
    extended = f"offset={SECTORS * 512},lazy_itable_init=0,lazy_journal_init=0"
    blocks = f"{(recipe.DISK_MIB - 2) * 1024}k"
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^metadata_csum_seed,^orphan_file"]
    argv += ["-U", recipe.ROOT_UUID, "-E", extended, "-d", str(work / "tree"), str(made.image), blocks]
    _run(machine, "write the file tree to the disk", *argv)


def _run(machine: Machine, why: str, *argv: str) -> None:
    done = machine.run(Command(argv, why), HOUR)
    if done.status:
        raise EmupmemError(f"cannot {why}: {done.last_words or f'status {done.status}'}")
