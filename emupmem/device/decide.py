# SPDX-License-Identifier: Apache-2.0
"""What to do with a device: which file system, where, with which commands. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from emupmem.device.blocks import FILE_SYSTEMS, UNSIGNED, Mounted, Pmem
from emupmem.device.proof import SeenMount
from emupmem.model import GIB, MIB, Check, Command, EmupmemError
from emupmem.record import record
from emupmem.system.host import Host
from emupmem.units import human

XFS_LEAST = 300 * MIB
EXT4_LEAST = 16 * MIB
MKFS_SECONDS = 120
HUGE_BLOCKS = 512
"""Blocks of 4 KiB in 2 MiB, what one huge page maps."""

_SYSTEM = (
    "/dev",
    "/proc",
    "/sys",
    "/run",
    "/boot",
    "/etc",
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
)
_TOP = ("home", "root", "tmp", "var", "opt")
_VAR = ("lib", "log", "tmp", "cache", "spool", "backups")
_TOO_HIGH = ("/", *(f"/{n}" for n in _TOP), *(f"/var/{n}" for n in _VAR))

Tell = Callable[[str], None]


@record
class MountRequest:
    """What the user asks; None and empty leave the choice to us. `owner` is USER[:GROUP], `mode` octal.

    `keep` is the image that the content is saved to and brought back from, empty where it is not kept.
    """

    device: str | None = None
    dir: str | None = None
    fs: str | None = None
    owner: str = ""
    mode: str = ""
    force: bool = False
    keep: str = ""


@record
class Folder:
    """What was seen of a folder: where it leads to, its state (see Host.folder_state), who may swap it."""

    real: str
    state: str
    loose_parent: str = ""


@record
class MountSteps:
    """What to do: commands in order; `make` the folder first. Nothing at all where it is as asked already."""

    device: Pmem
    dir: str
    fs: str
    commands: tuple[Command, ...] = ()
    make: bool = False
    kept: bool = False


@record
class MountOutcome:
    """What was done and seen: the five rungs of the proof, and the mount as verify sees it."""

    steps: MountSteps
    changed: bool
    seen: SeenMount
    rungs: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not any(c.status == "fail" for c in self.rungs)


# Decisions: pure ------------------------------------------------------------------------------------


def choose_pmem(devices: Sequence[Pmem], request: MountRequest, number: str) -> Pmem:
    """The device that is meant: the named one, whose MAJOR:MINOR is `number`, or the only one of ours.

    Raises EmupmemError for everything that is not a whole pmem device.
    """
    ours = [d for d in devices if d.item is not None]
    if request.device is None:
        if len(ours) == 1:
            return ours[0]
        listed = ", ".join(f"{d.dev} ({human(d.size)})" for d in ours)
        if ours:
            raise EmupmemError(
                f"there are {len(ours)} emulated devices: {listed}", "name the one that you mean"
            )
        raise EmupmemError("no emulated persistent memory is there", "sudo emupmem verify shows why")
    for device in devices:
        if number and number in device.partitions:
            raise EmupmemError(
                f"{request.device} is a partition",
                f"file systems for DAX take the whole device: {device.dev}",
            )
        if number and number == device.number:
            return device
    if not number:
        raise EmupmemError(
            f"{request.device} is not a block device", "sudo emupmem verify shows what is there"
        )
    raise EmupmemError(
        f"{request.device} is not persistent memory: emupmem never touches another disk",
        f"there are: {', '.join(d.dev for d in devices)}" if devices else "no pmem device is there",
    )


def default_dir(device: Pmem) -> str:
    """`/mnt/pmem0` for /dev/pmem0."""
    return f"/mnt/{device.dev.rpartition('/')[2]}"


def check_dir(name: str) -> str:
    """The folder's name without a slash at its end. Raises EmupmemError for what must not be mounted over."""
    plain = name.rstrip("/") or "/"
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise EmupmemError(f"{name!r} is not a name for a folder", "choose one without control characters")
    if not plain.startswith("/"):
        raise EmupmemError(f"{name} is not absolute", "name the folder from / on, as in /mnt/pmem0")
    if plain != "/" and {"", ".", ".."} & set(plain[1:].split("/")):
        raise EmupmemError(f"{name} is not a plain name", "write it without //, . and ..")
    if plain in _TOO_HIGH or any(plain == s or plain.startswith(f"{s}/") for s in _SYSTEM):
        raise EmupmemError(f"{plain} belongs to the system", "choose a separate folder, such as /mnt/pmem0")
    return plain


def check_folder(name: str, folder: Folder) -> None:
    """Raise EmupmemError where mounting at this folder would hide something or lead elsewhere."""
    if folder.real != name:
        raise EmupmemError(
            f"{name} leads to {folder.real} by a symbolic link",
            f"name {folder.real} if that is what you mean",
        )
    if folder.state == "no folder":
        raise EmupmemError(f"{name} is there and is not a folder", "choose another name")
    if folder.state == "full":
        raise EmupmemError(
            f"{name} is not empty: what is in it would be hidden", "choose an empty folder or a new one"
        )
    if folder.loose_parent:
        raise EmupmemError(
            f"{folder.loose_parent} can be changed by others than root, who could put a link in the place of {name}",
            "choose a folder below one that only root can change, as /mnt/pmem0; --owner gives it to a user",
        )


def check_mode(mode: str) -> int | None:
    """The permissions that an octal number means, None for the empty text. Raises EmupmemError."""
    if not mode:
        return None
    if not re.fullmatch(r"[0-7]{3,4}", mode):
        raise EmupmemError(f"{mode!r} is not a mode", "write three or four octal digits, as 0755")
    return int(mode, 8)


def check_fs(fs: str, size: int, what: str) -> None:
    """Raise EmupmemError where a device of `size` bytes is too small for the file system."""
    if fs == "xfs" and size < XFS_LEAST:
        raise EmupmemError(
            f"{what} has {human(size)}: mkfs.xfs makes nothing under 300 MiB", "--fs ext4 serves smaller ones"
        )
    if size < EXT4_LEAST:
        raise EmupmemError(f"{what} has {human(size)}: too small for a file system with huge pages")


def make_fs(fs: str, dev: str, size: int, kernel: tuple[int, int], force: bool) -> Command:
    """The command that makes a file system, on `size` bytes, whose files can be mapped by 2 MiB."""
    if fs == "ext4":
        # Without -b mke2fs takes 1 KiB blocks on small devices, and DAX wants blocks of a page.
        # No reserve for root: nothing of the system depends on what is volatile.
        stripe = f"stride={HUGE_BLOCKS},stripe_width={HUGE_BLOCKS}"
        force_word = ("-F",) if force else ()
        argv = ("mkfs.ext4", "-q", *force_word, "-b", "4096", "-m", "0", "-E", stripe, dev)
    else:
        # Before 6.0 the kernel refuses DAX together with reflink, which mkfs.xfs turns on.
        reflink = ("-m", "reflink=0") if kernel < (6, 0) else ()
        # A stripe makes mkfs.xfs think of many disks, and it divides the device by 8 or more instead of 4.
        # Up to 512 MiB the log, 64 MiB at least since xfsprogs 5.19, has no room in an eighth.
        few = ",agcount=4" if size < GIB else ""
        argv = ("mkfs.xfs", "-q", *(("-f",) if force else ()), *reflink, "-d", f"su=2m,sw=1{few}", dev)
    return Command(argv, f"make an {fs} file system laid out for 2 MiB pages")


def mount_command(fs: str, dev: str, folder: str, kernel: tuple[int, int]) -> Command:
    """The command that mounts with DAX for every file."""
    option = "dax=always" if kernel >= (5, 8) else "dax"
    return Command(("mount", "-t", fs, "-o", option, dev, folder), "mount it with DAX")


def decide(
    device: Pmem,
    request: MountRequest,
    mounts: Sequence[Mounted],
    signature: str,
    folder: Folder,
    kernel: tuple[int, int],
) -> MountSteps:
    """What to do with a device that holds `signature` (empty: blank). Raises EmupmemError for each refusal."""
    name = check_dir(request.dir or default_dir(device))
    if request.fs is not None and request.fs not in FILE_SYSTEMS:
        raise EmupmemError(f"{request.fs} is not supported", "DAX file systems are ext4 and xfs")
    here = mounted_here(device, request, mounts, name)
    if here is not None:
        return MountSteps(device, name, here.fs, kept=True)
    refuse_device(device)
    check_folder(name, folder)
    fs = request.fs or (signature if signature in FILE_SYSTEMS and not request.force else FILE_SYSTEMS[0])
    kept = bool(signature) and signature == fs and not request.force
    if signature and not kept:
        _refuse_signature(device, signature, fs, request.force)
    commands = [] if kept else [make_fs(fs, device.dev, device.size, kernel, request.force)]
    if not kept:
        check_fs(fs, device.size, device.dev)
    commands.append(mount_command(fs, device.dev, name, kernel))
    return MountSteps(device, name, fs, tuple(commands), folder.state == "missing", kept)


def mounted_here(device: Pmem, request: MountRequest, mounts: Sequence[Mounted], name: str) -> Mounted | None:
    """The mount that is as asked already, None where the device is not mounted; EmupmemError else."""
    top = next((m for m in reversed(mounts) if m.dir == name), None)
    own = [m for m in mounts if m.number == device.number]
    if top is not None and top.number != device.number:
        raise EmupmemError(f"{name} is a mount point already ({top.source})", "choose another folder")
    for mount in own:
        if mount.dir != name or mount.root != "/":
            raise EmupmemError(
                f"{device.dev} is mounted at {mount.dir} already", f"sudo emupmem umount {mount.dir} first"
            )
    if top is None:
        return None
    hint = f"sudo emupmem umount {name} first"
    if request.force:
        raise EmupmemError(
            f"{device.dev} is mounted at {name}: a mounted file system is never recreated", hint
        )
    if request.fs is not None and request.fs != top.fs:
        raise EmupmemError(f"{device.dev} is mounted at {name} with {top.fs}, not {request.fs}", hint)
    if not top.dax:
        raise EmupmemError(f"{device.dev} is mounted at {name} without DAX", hint)
    return top


def refuse_device(device: Pmem) -> None:
    if device.partitions:
        raise EmupmemError(
            f"{device.dev} has partitions",
            "file systems for DAX take the whole device; emupmem leaves them alone",
        )
    if device.holders:
        raise EmupmemError(
            f"{device.dev} is a part of {', '.join(device.holders)}", "take it out of there first"
        )
    if device.read_only:
        raise EmupmemError(
            f"{device.dev} is read-only", f"blockdev --setrw {device.dev} if that is not on purpose"
        )
    if device.dax is False:
        raise EmupmemError(
            f"{device.dev} has no DAX (queue/dax is 0)", "its namespace is not in fsdax mode: ndctl list -N"
        )


def _refuse_signature(device: Pmem, signature: str, fs: str, force: bool) -> None:
    if device.item is None:
        raise EmupmemError(
            f"{device.dev} holds {signature} and is not one of emupmem's devices: what is on it may be persistent",
            "emupmem makes no file system over it, not even with --force; "
            + (f"mkfs.{fs} {device.dev} does" if signature == UNSIGNED else "wipefs is for that"),
        )
    if not force:
        raise EmupmemError(
            f"{device.dev} holds {signature}",
            f"--force destroys that and makes a new {fs}",
        )


# Looking ---------------------------------------------------------------------------------------------


def folder_of(machine: Host, name: str) -> Folder:
    return Folder(machine.real(name), machine.folder_state(name), machine.loose_parent(name))
