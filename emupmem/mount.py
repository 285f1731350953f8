"""From a pmem device to a folder: what may be done with a device (pure), and doing it through `Machine`.

A file system is made on a blank device only, unless --force says otherwise of one of our own; what
is mounted is never formatted, and no disk that is not persistent memory is ever touched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from emupmem import dax, keep, unit
from emupmem.blocks import Mounted, Pmem, devices, mounts, signature
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, MIB, UNCHANGED, Busy, Check, Command, EmupmemError
from emupmem.system import accounts, files, lock, processes
from emupmem.system.lock import interrupts, wait_for
from emupmem.system.machine import Machine
from emupmem.units import human, tight
from emupmem.verifier.ladder import mount_rungs
from emupmem.verifier.observation import SeenMount

FILE_SYSTEMS = ("ext4", "xfs")
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
VOLATILE = "emulated, volatile: its content does not survive a power cycle"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Folder:
    """What was seen of a folder: where it leads to, its state (see Machine.folder_state), who may swap it."""

    real: str
    state: str
    loose_parent: str = ""


@dataclass(frozen=True, slots=True)
class Steps:
    """What to do: commands in order; `make` the folder first. Nothing at all where it is as asked already."""

    device: Pmem
    dir: str
    fs: str
    commands: tuple[Command, ...] = ()
    make: bool = False
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done and seen: the five rungs of the proof, and the mount as verify sees it."""

    steps: Steps
    changed: bool
    seen: SeenMount
    rungs: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not any(c.status == "fail" for c in self.rungs)


# Decisions: pure ------------------------------------------------------------------------------------


def choose(devices: Sequence[Pmem], request: MountRequest, number: str) -> Pmem:
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
        raise EmupmemError("no emulated persistent memory is there", "sudo emupmem verify tells why")
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
            f"{request.device} is not a block device", "sudo emupmem verify tells what is there"
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
        raise EmupmemError(f"{plain} belongs to the system", "choose a folder of its own, as /mnt/pmem0")
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
) -> Steps:
    """What to do with a device that holds `signature` (empty: blank). Raises EmupmemError for each refusal."""
    name = check_dir(request.dir or default_dir(device))
    if request.fs is not None and request.fs not in FILE_SYSTEMS:
        raise EmupmemError(f"{request.fs} is not supported", "DAX file systems are ext4 and xfs")
    here = _mounted_here(device, request, mounts, name)
    if here is not None:
        return Steps(device, name, here.fs, kept=True)
    _refuse_device(device)
    check_folder(name, folder)
    fs = request.fs or (signature if signature in FILE_SYSTEMS and not request.force else FILE_SYSTEMS[0])
    kept = bool(signature) and signature == fs and not request.force
    if signature and not kept:
        _refuse_signature(device, signature, fs, request.force)
    commands = [] if kept else [make_fs(fs, device.dev, device.size, kernel, request.force)]
    if not kept:
        check_fs(fs, device.size, device.dev)
    commands.append(mount_command(fs, device.dev, name, kernel))
    return Steps(device, name, fs, tuple(commands), folder.state == "missing", kept)


def _mounted_here(
    device: Pmem, request: MountRequest, mounts: Sequence[Mounted], name: str
) -> Mounted | None:
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
        raise EmupmemError(f"{device.dev} is mounted at {name}: what is mounted is never made anew", hint)
    if request.fs is not None and request.fs != top.fs:
        raise EmupmemError(f"{device.dev} is mounted at {name} with {top.fs}, not {request.fs}", hint)
    if not top.dax:
        raise EmupmemError(f"{device.dev} is mounted at {name} without DAX", hint)
    return top


def _refuse_device(device: Pmem) -> None:
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
            "emupmem makes no file system over it, not even with --force; wipefs is for that",
        )
    if not force:
        raise EmupmemError(
            f"{device.dev} holds {signature}",
            f"--force destroys that and makes a new {fs}",
        )


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 12) of `6.12.5-amd64`; an unknown kernel counts as new."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (99, 0)


# Looking ---------------------------------------------------------------------------------------------


def _folder(machine: Machine, name: str) -> Folder:
    return Folder(machine.real(name), machine.folder_state(name), machine.loose_parent(name))


def look(machine: Machine, wanted: Sequence[unit.BootMount]) -> tuple[SeenMount, ...]:
    """What verify judges: each mount that the boot unit asks for, and each of our devices mounted besides."""
    all_mounts = mounts(machine)
    ours = [d for d in devices(machine) if d.item is not None]
    seen = []
    for mount in wanted:
        range_ = (mount.start, mount.size)
        device = next((d for d in ours if d.item and (d.item.start, d.item.size) == range_), None)
        one = _seen(machine, device, mount.dir, mount.fs, all_mounts, True)
        seen.append(dataclasses.replace(one, keep=mount.keep))
    asked = {s.device for s in seen}
    for device in ours:
        at = [m for m in all_mounts if m.number == device.number and m.root == "/"]
        if device.dev not in asked and at:
            seen.append(_seen(machine, device, at[0].dir, "", all_mounts, False))
    return tuple(seen)


def _seen(
    machine: Machine,
    device: Pmem | None,
    folder: str,
    fs: str,
    all_mounts: Iterable[Mounted],
    at_boot: bool,
) -> SeenMount:
    if device is None:
        return SeenMount("", folder, fs, None, "", (), at_boot=at_boot)
    own = [m for m in all_mounts if m.number == device.number]
    here = next((m for m in own if m.dir == folder and m.root == "/"), None)
    if here is None:
        found: str | None = own[0].fs if own else None
        if found is None and machine.is_root:
            try:
                found = signature(machine, device.dev)
            except EmupmemError:
                found = None
        return SeenMount(device.dev, folder, fs, found, own[0].dir if own else "", (), at_boot=at_boot)
    proof = dax.prove(str(machine.path(folder)))
    return SeenMount(
        device.dev,
        folder,
        fs,
        here.fs,
        folder,
        here.options,
        proof.dax_file,
        proof.map_sync,
        proof.faults,
        proof.huge_pages,
        _no_huge_pages(machine),
        proof.aligned,
        proof.why,
        at_boot,
    )


def _no_huge_pages(machine: Machine) -> str:
    """Why this kernel cannot map files by 2 MiB at all, empty where it can or that is not known."""
    name, config = machine.kernel_config(machine.peek("/proc/sys/kernel/osrelease"))
    if name and not re.search(r"^CONFIG_FS_DAX_PMD=y", config, re.MULTILINE):
        return f"this kernel is built without CONFIG_FS_DAX_PMD ({name})"
    return ""


# Doing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was found good: the steps, and the ids and the mode that its words mean."""

    steps: Steps
    owner: tuple[int, int] | None
    mode: int | None


def prepare(machine: Machine, request: MountRequest) -> Prepared:
    """Look at the device and decide, changing nothing. Raises EmupmemError for every refusal."""
    owner = accounts.find_account(machine, request.owner) if request.owner else None
    mode = check_mode(request.mode)
    if request.dir is not None:
        check_dir(request.dir)
    number = machine.block_number(request.device) if request.device else ""
    if request.device is not None and not request.device.startswith("/"):
        raise EmupmemError(f"{request.device} is not absolute", f"did you mean /dev/{request.device}?")
    device = choose(devices(machine), request, number)
    request = dataclasses.replace(request, dir=check_dir(request.dir or default_dir(device)))
    name = request.dir or ""
    kernel = kernel_version(machine.peek("/proc/sys/kernel/osrelease"))
    all_mounts = mounts(machine)
    holds = ""
    if _mounted_here(device, request, all_mounts, name) is None:
        _refuse_device(device)  # each with its own words, before the kernel's EBUSY
        with lock.hold_device(machine, device.dev):
            holds = signature(machine, device.dev)
    steps = decide(device, request, all_mounts, holds, _folder(machine, name), kernel)
    missing = [c.argv[0] for c in steps.commands if machine.find(c.argv[0]) is None]
    if missing:
        raise EmupmemError(f"{missing[0]} is not installed", _package(missing[0]))
    return Prepared(steps, owner, mode)


def _package(program: str) -> str:
    return {"mkfs.xfs": "apt-get install xfsprogs", "mkfs.ext4": "apt-get install e2fsprogs"}.get(program, "")


def carry_out(machine: Machine, prepared: Prepared, at_boot: bool = False) -> Outcome:
    """Make, mount, give to the owner, prove. Raises EmupmemError, which says how far it came.

    A proof that fails is in the outcome: nothing is undone.
    """
    steps = prepared.steps
    if at_boot and steps.kept and steps.fs == "ext4" and steps.commands:
        _check_ext4(machine, steps)
    if steps.make:
        files.make_folders(machine, steps.dir)
        if machine.real(steps.dir) != steps.dir or machine.folder_state(steps.dir) != "empty":
            raise EmupmemError(f"{steps.dir} changed while it was made", "look at it and try again")
    for command in steps.commands:
        done = machine.run(command, MKFS_SECONDS)
        if done.status:
            raise EmupmemError(
                f"{command.argv[0]} failed with status {done.status}: {done.last_words}",
                _mount_hint(steps, command),
            )
    device = steps.device
    changed = bool(steps.commands)
    if prepared.owner is not None or prepared.mode is not None:
        changed |= files.set_mount_owner(machine, steps.dir, device.number, prepared.owner, prepared.mode)
    seen = _seen(machine, device, steps.dir, steps.fs, mounts(machine), False)
    return Outcome(steps, changed, seen, mount_rungs((seen,)))


def _mount_hint(steps: Steps, command: Command) -> str:
    if command.argv[0] != "mount":
        return f"{steps.device.dev} is not mounted"
    if steps.kept:
        return (
            f"the {steps.fs} that is on {steps.device.dev} cannot be mounted with DAX; "
            f"sudo emupmem mount {steps.device.dev} {steps.dir} --force makes a new one (and destroys it)"
        )
    return "sudo dmesg | tail tells why"


def _check_ext4(machine: Machine, steps: Steps) -> None:
    """What RAM kept over a warm restart may be damaged; e2fsck repairs what is safe and refuses the rest."""
    done = machine.output("e2fsck", "-p", steps.device.dev, timeout=MKFS_SECONDS)
    if done is not None and done.status >= 4:
        raise EmupmemError(
            f"the ext4 that was on {steps.device.dev} before this start is damaged: {done.last_words}",
            f"sudo emupmem mount {steps.device.dev} {steps.dir} --force makes a new one (and destroys it)",
        )


def umount(machine: Machine, name: str) -> Mounted:
    """Unmount persistent memory. Raises EmupmemError for other mounts, and when busy with who holds it."""
    folder = check_dir(name)
    all_mounts = mounts(machine)
    top = next((m for m in reversed(all_mounts) if m.dir == folder), None)
    if top is None:
        raise EmupmemError(f"nothing is mounted at {folder}", "emupmem verify tells what is")
    if top.number not in {d.number for d in devices(machine)}:
        raise EmupmemError(f"{folder} is not persistent memory: {top.source}", "umount is for other mounts")
    done = machine.run(Command(("umount", folder), "unmount it"))
    if not done.status:
        return top
    above = sorted(m.dir for m in all_mounts if m.dir.startswith(f"{folder}/"))
    holders = [f"the mount {d}" for d in above] + processes.processes_using(machine, top.number)
    if holders:
        listed = ", ".join(holders[:8]) + (f" and {len(holders) - 8} more" if len(holders) > 8 else "")
        raise EmupmemError(f"{folder} is in use by {listed}", "end these, then try again", state=UNCHANGED)
    raise EmupmemError(f"umount failed with status {done.status}: {done.last_words}")


def mount(machine: Machine, request: MountRequest, boots: bool) -> tuple[Outcome, unit.UnitChange | None]:
    """The whole of the mount command; `boots` installs the unit as well. Raises EmupmemError."""
    with lock.change_lock(machine), interrupts() as stop:
        prepared = prepare(machine, request)
        if boots:
            at_boot(machine, prepared.steps, request)  # refuses before anything is done
        if request.keep:
            _refuse_keep(machine, prepared.steps, request)
        stop.check()  # from here on to the end: it takes a moment, and half of it serves nobody
        outcome = carry_out(machine, prepared)
        change = at_boot(machine, prepared.steps, request) if boots else None
        if change is not None and change.needed:
            write_unit(machine, change)
        if request.keep:
            keep.remember(machine, _boot_mount(prepared.steps, request))
    if request.keep and machine.live:
        # Only an active unit saves when it is stopped. It finds all as it should be.
        done = machine.run(Command(("systemctl", "start", unit.NAME), "have it active"), MKFS_SECONDS)
        if done.status:
            raise EmupmemError(
                f"{unit.NAME} does not start: {done.last_words}", f"journalctl -b -u {unit.NAME}"
            )
    return outcome, change


def _refuse_keep(machine: Machine, steps: Steps, request: MountRequest) -> None:
    """Two contents and one image: which of them counts must not be guessed. Raises EmupmemError."""
    if machine.file_size(request.keep) is None or keep.belongs(machine, _boot_mount(steps, request)):
        return
    raise EmupmemError(
        f"{request.keep} is there already, and what {steps.device.dev} holds now would be saved over it",
        f"sudo emupmem restore {request.keep} {steps.device.dev} brings it back, then mv it away; or give "
        "another name",
    )


def _boot_mount(steps: Steps, request: MountRequest) -> unit.BootMount:
    item = steps.device.item
    assert item is not None  # at_boot has refused everything else
    return unit.BootMount(
        item.start, item.size, steps.dir, steps.fs, request.owner, request.mode, request.keep
    )


def is_at_boot(machine: Machine, folder: str) -> bool:
    """Whether the unit mounts something at this folder."""
    try:
        data = machine.read(unit.FILE)
        return data is not None and any(m.dir == folder for m in unit.read(data.decode("utf-8", "replace")))
    except EmupmemError:
        return False


# At every boot -------------------------------------------------------------------------------------------


def boot(machine: Machine, wanted: Sequence[unit.BootMount], say: Tell) -> int:
    """What the unit runs: mount what can be mounted, a line for each.

    0 if all is well, 1 if a mount failed, `unit.SOME_FAILED` if one failed and another one is kept.
    """
    well = True
    for mount in wanted:
        try:
            say(_boot_one(machine, mount))
        except EmupmemError as exc:
            well = False
            hint = f"; {exc.hint}" if exc.hint else ""
            say(f"emupmem: {mount.dir} is not mounted: {exc.message}{hint}")
    if well:
        return 0
    return unit.SOME_FAILED if any(m.keep and keep.belongs(machine, m) for m in wanted) else 1


def _boot_one(machine: Machine, wanted: unit.BootMount) -> str:
    items = parse_command_line(machine.peek("/proc/cmdline")).reservations
    if not any((i.start, i.size) == (wanted.start, wanted.size) for i in items):
        ends = wanted.start + wanted.size
        other = next((i for i in items if i.start < ends and wanted.start < i.start + i.size), None)
        if other is not None:
            raise EmupmemError(
                f"this boot reserves memmap={other.text} where it was memmap={wanted.range}",
                "sudo emupmem apply --replace --size … --mount … makes the two agree",
            )
        # After `remove`, in a rescue entry, or before the first reboot: nothing is wrong.
        return f"this boot does not reserve memmap={wanted.range}: nothing to mount at {wanted.dir}"
    device = _wait_for_device(machine, wanted)
    request = MountRequest(device.dev, wanted.dir, wanted.fs, wanted.owner, wanted.mode)
    brought = False

    def work() -> Outcome:
        nonlocal brought
        if wanted.keep and not keep.belongs(machine, wanted):
            # What the memory still holds after a warm restart is no save: the image counts.
            brought = keep.bring_back(machine, wanted, device.dev)
        outcome = carry_out(machine, prepare(machine, request), at_boot=True)
        if wanted.keep:
            keep.remember(machine, wanted)
        return outcome

    outcome = _locked(machine, work)
    if not outcome.ok:
        broken = next(c for c in outcome.rungs if c.status == "fail")
        raise EmupmemError(f"it is mounted, but {broken.name}: {broken.found}", broken.hint)
    kept = "kept from before this start" if outcome.steps.kept else "made anew"
    if brought:
        kept = f"brought back from {wanted.keep}"
    fate = f"saved to {wanted.keep} at an orderly shutdown only" if wanted.keep else VOLATILE
    return f"{device.dev} is mounted at {wanted.dir} · {outcome.steps.fs}, {kept} · {fate}"


def _wait_for_device(machine: Machine, wanted: unit.BootMount) -> Pmem:
    def found() -> Pmem | None:
        ready = (d for d in devices(machine) if d.start == wanted.start and machine.block_number(d.dev))
        return next(ready, None)

    wait_for(lambda: found() is not None, unit.SECONDS)
    machine.settle()  # udev has the device open while it looks at it
    device = found()
    if device is None:
        raise EmupmemError(
            f"no device for memmap={wanted.range} appeared within {unit.SECONDS} seconds",
            "sudo emupmem verify tells why",
        )
    if device.size != wanted.size:
        raise EmupmemError(
            f"{device.dev} has {human(device.size)} instead of {human(wanted.size)}",
            "sudo emupmem verify tells why",
        )
    return device


def _locked(machine: Machine, work: Callable[[], Outcome]) -> Outcome:
    """Do it under the lock, for which a boot waits."""
    problem: list[EmupmemError] = []
    done: list[Outcome] = []

    def attempt() -> bool:
        try:
            with lock.change_lock(machine):
                done.append(work())
        except EmupmemError as exc:
            problem[:] = [exc]
            return not isinstance(exc, Busy)  # udev or another emupmem may hold what we need for a moment
        return True

    wait_for(attempt, unit.SECONDS)
    if not done:
        raise problem[0]
    return done[0]


def program(machine: Machine) -> str:
    """The emupmem that the unit may start as root: installed where only root can change it. Raises EmupmemError."""
    places = ("/usr/local/bin/emupmem", "/usr/bin/emupmem")
    for place in places:
        if machine.exists(place):
            loose = machine.loose_parent(machine.real(place)) or machine.loose(place)
            if not loose:
                return place
            raise EmupmemError(
                f"{place} leads to {machine.real(place)}, which others than root can change",
                "make install puts emupmem where it is safe to start it at boot",
            )
    if not machine.live:
        return places[0]
    raise EmupmemError(
        "emupmem is not installed for the machine, and a boot could not start it", "make install does that"
    )


@dataclass(frozen=True, slots=True)
class Wish:
    """One --mount of apply: the folder, and what belongs to it."""

    dir: str
    fs: str = FILE_SYSTEMS[0]
    owner: str = ""
    mode: str = ""
    keep: str = ""


def check_wishes(machine: Machine, wishes: Sequence[Wish]) -> None:
    """Everything of --mount that can be judged before anything is changed. Raises EmupmemError."""
    for wish in wishes:
        name = check_dir(wish.dir)
        check_mode(wish.mode)
        if wish.owner:
            accounts.find_account(machine, wish.owner)
        tool = f"mkfs.{wish.fs}"
        if machine.live and machine.find(tool) is None:
            raise EmupmemError(f"{tool} is not installed", _package(tool))
        # As before the reboot; a device of ours that is there already when apply runs again is as asked.
        ours = {d.number for d in devices(machine)} if machine.live else set()
        top = next((m for m in reversed(mounts(machine)) if m.dir == name), None) if machine.live else None
        if top is not None and top.number not in ours:
            raise EmupmemError(f"{name} is a mount point already ({top.source})", "choose another folder")
        if top is None:
            check_folder(name, _folder(machine, name))
    if wishes:
        program(machine)


def unit_change(
    machine: Machine,
    reserved: Sequence[tuple[int, int]],
    wishes: Sequence[tuple[tuple[int, int], Wish]] = (),
) -> unit.UnitChange:
    """The unit when `reserved` (pairs start, size) is what boots; `wishes` are added for their ranges.

    Raises EmupmemError; a unit that is not ours is an error only where there are wishes.
    """
    data = machine.read(unit.FILE)
    before = data.decode("utf-8", "surrogateescape") if data is not None else None
    linked = machine.is_link(unit.LINK)
    if before is None and not wishes:
        return unit.UnitChange(None, None, linked)
    if not wishes and not reserved and before is not None and before.startswith(unit.MARK):
        return unit.UnitChange(before, None, linked)  # whatever was edited in it
    new = []
    for (start, size), wish in wishes:
        check_fs(wish.fs, size, f"the device of {tight(size)}")
        name = check_dir(wish.dir)
        if wish.keep:
            keep.check(machine, wish.keep, size, name)
        new.append(unit.BootMount(start, size, name, wish.fs, wish.owner, wish.mode, wish.keep))
    if not new:
        try:
            present = unit.read(before or "")
        except EmupmemError:
            return unit.UnitChange(before, before, True)
        if all((m.start, m.size) in reserved for m in present):
            return unit.UnitChange(before, before, True)  # nothing was asked of it
    return unit.changed(before, linked, reserved, program(machine), new)


def write_unit(machine: Machine, change: unit.UnitChange) -> None:
    """Put the unit there and enable it, or take both away. Raises EmupmemError."""
    if change.after is not None:
        files.install_file(machine, unit.FILE, change.after)
        files.make_link(machine, unit.LINK, unit.FILE)
    else:
        files.delete_file(machine, unit.LINK)
        files.delete_file(machine, unit.FILE)
    if machine.live:
        machine.output("systemctl", "daemon-reload")


def at_boot(machine: Machine, steps: Steps, request: MountRequest) -> unit.UnitChange:
    """The unit that does the same at every boot. Raises EmupmemError for a device that is not ours."""
    item = steps.device.item
    if item is None:
        raise EmupmemError(
            f"{steps.device.dev} is not one of emupmem's devices",
            "its content stays: a line in /etc/fstab serves it",
        )
    if not steps.device.whole:
        raise EmupmemError(
            f"{steps.device.dev} is a part of what memmap={item.text} reserves",
            "at every boot only whole devices are mounted",
        )
    items = parse_command_line(machine.peek("/proc/cmdline")).reservations
    wish = Wish(steps.dir, steps.fs, request.owner, request.mode, request.keep)
    configured = _configured(machine) or [(i.start, i.size) for i in items]
    return unit_change(machine, [*configured, (item.start, item.size)], [((item.start, item.size), wish)])


def _configured(machine: Machine) -> list[tuple[int, int]]:
    """Ranges that the present unit names: mount --at-boot takes none of them away."""
    data = machine.read(unit.FILE)
    return [(m.start, m.size) for m in unit.read(data.decode("utf-8", "replace"))] if data is not None else []
