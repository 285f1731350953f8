"""Boot loaders: what each machine boots with, what its next start will tell the kernel, and how to change that.

GRUB with a grub.cfg by grub-mkconfig is the case that `change` handles itself (`of` gives None for it). Each
other way is one `Loader`: it reads how the next start stands, and gives the edits and commands of a change
as data; the transaction in `change` carries them out, reads everything again and judges it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from emupmem import bls, grubcfg
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.foreign import BOOTC, PLACEHOLDER, Owner, Refused, RefusedRemoval
from emupmem.grubcfg import BootEntry
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import UNCHANGED, Command, CommandLine, EmupmemError, FileEdit
from emupmem.system import backups
from emupmem.system.backups import BACKUPS
from emupmem.system.machine import Machine

KERNEL_CMDLINE = "/etc/kernel/cmdline"
VENDOR_CMDLINE = "/usr/lib/kernel/cmdline"
CMDLINE_D = "/etc/kernel/cmdline.d"
FORMER_DROPIN = f"{CMDLINE_D}/zz-emupmem."
"""What an emupmem before this one wrote there: sdbootutil joins that folder and /etc/kernel/cmdline, and
kernel-install's plug-ins do not read it at all (systemd issue 23308)."""

SOURCES = (GRUB_DEFAULT, KERNEL_CMDLINE)
BOOT_FOLDERS = ("/efi", "/boot/efi", "/boot")
"""Where an EFI system partition or an extended boot partition is mounted (bootctl(1))."""

_EFI = "/sys/firmware/efi/efivars/{}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
LOADER_INFO = _EFI.format("LoaderInfo")
STUB_INFO = _EFI.format("StubInfo")
SELECTED = _EFI.format("LoaderEntrySelected")
ONE_SHOT = _EFI.format("LoaderEntryOneShot")

SNAPSHOT = re.compile(r"(?:\A|/)\.snapshots/\d+/snapshot\Z")
"""How a subvolume of snapper's ends."""

TRIAL_ENTRY = "emupmem-trial.conf"
"""The entry of a trial boot (see `oneshot`): no one of those that a change is about."""

FORGET_TRIAL = Command(("bootctl", "set-oneshot", ""), "forget the choice of the trial")

PROGRAMS = ("grubby", "sdbootutil", "rpm-ostree", "kernel-install", "bootctl")
"""What the loaders here look for, or run."""

BOOTCTL_LIST = ("bootctl", "list", "--json=short")
KARGS = ("rpm-ostree", "kargs")

MAY_BE_UNSET = ("tuned_params",)
"""Variables in entries that have a value only while TuneD wants to add words."""

KERNEL_INSTALL_ADDS = ("systemd.machine_id=",)
"""Words that kernel-install adds by itself (90-loaderentry.install): they do not belong into its source."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How the next start is set up.

    `items` are ours (`1G!4G`) in the source that new kernels take their words from, `where` names it. `menu` is
    where the entries lie, `default` the one that boots by itself, None where that cannot be told. `trial` are the
    words of the entry for a trial boot, which is not among `entries`; `chosen` says that the next start takes it.
    `notes` are for a person who changes it.
    """

    items: tuple[str, ...]
    where: str
    menu: str
    entries: tuple[BootEntry, ...]
    default: BootEntry | None
    trial: tuple[str, ...] = ()
    chosen: bool = False
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> CommandLine | None:
        """The words of the entry that boots by default."""
        return self.default.command_line if self.default is not None else None


@dataclass(frozen=True, slots=True)
class Steps:
    """A change as data: files to write, then programs to run; `undo` takes back what those did.

    `owned` are files that the programs write or make: kept before they run, and put back when something goes
    wrong. Of these, and of what a program writes after us, an edit may be one that changes nothing. `torn` are
    files that a run which was killed left half-written: first of all their whole copy takes their place.
    """

    edits: tuple[FileEdit, ...] = ()
    commands: tuple[Command, ...] = ()
    owned: tuple[str, ...] = ()
    undo: tuple[Command, ...] = ()
    torn: tuple[str, ...] = ()


class Loader(ABC):
    """One way to tell the kernel of the next start what to reserve.

    `title` names it, `back` tells how to start without the reservation by hand.
    """

    title: str
    back: str

    @abstractmethod
    def standing(self, machine: Machine) -> Standing:
        """How the next start stands. Raises EmupmemError where that cannot be read."""

    @abstractmethod
    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        """What makes our items exactly `items`, with `extra` words added and `drop` words taken away.

        Nothing in it where all is so already. Raises EmupmemError.
        """

    @abstractmethod
    def refuse(self, machine: Machine) -> None:
        """Raise EmupmemError where this way is not open on the machine."""

    def refuse_trial(self, machine: Machine) -> None:
        """Raise EmupmemError where a trial boot is not possible."""
        raise EmupmemError(
            f"a trial is not known for {self.title}, which starts this machine",
            "apply without --trial; " + self.back.format(memmap="memmap=…") + " goes back",
        )


class Owned(Loader):
    """Boot entries that belong to another tool: nothing is changed, and what to do instead is said."""

    back = "as that tool says"

    def __init__(self, by: Owner) -> None:
        self.by, self.title = by, by.title

    def standing(self, machine: Machine) -> Standing:
        raise Refused(self.by)

    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        raise Refused(self.by)

    def refuse(self, machine: Machine) -> None:
        raise Refused(self.by)

    def refuse_trial(self, machine: Machine) -> None:
        raise Refused(self.by)

    def refuse_removal(self, machine: Machine) -> None:
        """Raise EmupmemError with the way to give back what is reserved."""
        booted = parse_command_line(machine.peek("/proc/cmdline")).reservations if machine.running else ()
        words = f"memmap={','.join(i.text for i in booted)}" if booted else PLACEHOLDER
        raise RefusedRemoval(self.by, words)


def of(machine: Machine) -> Loader | None:
    """What starts the machine, None for GRUB with a menu by grub-mkconfig (and where nothing is to be seen)."""
    from emupmem import detect

    if machine.exists("/run/ostree-booted" if machine.running else "/ostree/repo"):
        return RpmOstree()
    by = detect.owner(machine)
    if by is not None:
        return Owned(by)
    entries = bool(entry_files(machine))
    if entries and machine.find("sdbootutil") is not None and machine.running:
        return SdBootUtil()
    if machine.running and "systemd-boot" in loader_name(machine).lower() and not detect.by_grub(machine):
        return SystemdBoot()
    if grub_reads_bls(machine):
        return GrubBls()
    if entries and not machine.running and not machine.exists(environment.grub_cfg(machine)):
        return SystemdBoot()
    return None


def loader_name(machine: Machine) -> str:
    """What the boot loader calls itself in the UEFI variable LoaderInfo, empty where it left none."""
    return efi_text(machine, LOADER_INFO)


def efi_variable(name: str) -> str:
    """The file of a variable of the boot loader's."""
    return _EFI.format(name)


def efi_text(machine: Machine, name: str) -> str:
    """Text of a UEFI variable: four bytes of attributes, then UTF-16."""
    data = machine.peek(name).encode("utf-8", "surrogateescape")
    return re.sub(r"[^\x20-\x7e]", "", data.replace(b"\0", b"").decode("utf-8", "replace"))


def grub_reads_bls(machine: Machine) -> bool:
    """Whether GRUB takes its entries from files of the Boot Loader Specification."""
    try:
        menu = (machine.read(environment.grub_cfg(machine)) or b"").decode("utf-8", "surrogateescape")
    except EmupmemError:
        menu = ""
    asked = re.search(
        r"^\s*(?:export\s+)?GRUB_ENABLE_BLSCFG=[\"']?true", machine.peek(GRUB_DEFAULT), re.MULTILINE
    )
    return grubcfg.uses_bls(menu) or asked is not None


# Entries of the Boot Loader Specification ------------------------------------------------------------


def entry_files(machine: Machine, folders: Sequence[str] = BOOT_FOLDERS) -> list[str]:
    """The entries that lie here, one name for each file."""
    found: dict[str, str] = {}
    for folder in folders:
        for name in machine.names(f"{folder}/loader/entries"):
            if name.endswith(".conf") and name != TRIAL_ENTRY:
                file = f"{folder}/loader/entries/{name}"
                found.setdefault(machine.real(file), file)
    return list(found.values())


def trial_file(machine: Machine) -> str:
    """The entry of a trial boot, empty where there is none."""
    names = [f"{folder}/loader/entries/{TRIAL_ENTRY}" for folder in BOOT_FOLDERS]
    return next((n for n in names if machine.exists(n)), "")


def one_shot(machine: Machine) -> str:
    """The entry that is chosen for the next start only, empty where there is none."""
    return efi_text(machine, ONE_SHOT)


def trial_chosen(machine: Machine) -> bool:
    """Whether the next start takes the trial."""
    return one_shot(machine) == TRIAL_ENTRY


def _text(machine: Machine, name: str) -> str:
    return (machine.read(name) or b"").decode("utf-8", "surrogateescape")


def entry_text(machine: Machine, name: str) -> str:
    """An entry; of one that a program tore when it was killed, the copy that lies beside it."""
    text = _text(machine, name)
    if any(key in ("linux", "efi") for key, _ in bls.fields(text)):
        return text
    aside = backups.read_aside(machine, name)
    return aside.decode("utf-8", "surrogateescape") if aside is not None else text


def _torn(machine: Machine, names: Sequence[str]) -> tuple[str, ...]:
    """The entries, and the source of new kernels' words, that a program which was killed left half-written."""
    torn = [n for n in names if _text(machine, n) != entry_text(machine, n)]
    return (*torn, *([KERNEL_CMDLINE] if _source_is_torn(machine) else []))


def _edit(machine: Machine, name: str, text: str) -> FileEdit:
    before = entry_text(machine, name)
    return FileEdit(name, before.encode("utf-8", "surrogateescape"), text.encode("utf-8", "surrogateescape"))


def _changed(edits: Sequence[FileEdit]) -> tuple[FileEdit, ...]:
    return tuple(e for e in edits if e.before != e.after)


def _belongs_here(machine: Machine, name: str, text: str, running: CommandLine) -> bool:
    """Whether an entry starts this system, and not another one that shares the partition.

    By the machine's id or its entry token where the entry tells one, else by the root file system.
    """
    if not bls.value(text, "linux") or _is_of_another_snapshot(machine, text):
        return False
    ident = machine.peek("/etc/machine-id").strip()
    told = bls.value(text, "machine-id")
    if told:
        return told == ident
    token = machine.peek("/etc/kernel/entry-token").strip() or ident
    stem = name.rpartition("/")[2]
    if token and stem.startswith(f"{token}-"):
        return True
    if re.match(r"[0-9a-f]{32}-", stem):
        return False  # another machine's
    return _root_words(bls.options(text)) == _root_words(running.text)


def _own_line(machine: Machine) -> CommandLine:
    """A command line that starts this system: of this boot; in a tree /etc/kernel/cmdline, else the default entry."""
    if machine.running:
        return parse_command_line(machine.peek("/proc/cmdline"))
    from emupmem import detect

    texts = {detect.id_of(n): entry_text(machine, n) for n in entry_files(machine)}
    menu = [
        bls.options(texts[n]) for n in detect.menu(machine) if n in texts and bls.value(texts[n], "linux")
    ]
    here = [line for line in menu if f"root={_root_of(machine)}" in parse_command_line(line).words]
    lines = (bls.file_line(machine.peek(KERNEL_CMDLINE)), *here, *menu)
    return parse_command_line(next((line for line in lines if "root=" in line), ""))


def _root_of(machine: Machine) -> str:
    """What /etc/fstab mounts at /, empty where it does not say."""
    lines = [x.split("#")[0].split() for x in machine.peek("/etc/fstab").splitlines()]
    return next((f[0] for f in lines if len(f) > 1 and f[1] == "/"), "")


def _is_of_another_snapshot(machine: Machine, text: str) -> bool:
    """Whether an entry starts a snapshot of snapper's that is not the one that runs (or boots by default in a tree)."""
    theirs, here = subvolume(bls.options(text)), _subvolume_here(machine)
    return bool(theirs and here and SNAPSHOT.search(theirs) and theirs != here)


def subvolume(line: str) -> str:
    """The subvolume that a command line names in its rootflags, empty where it names none."""
    flags = [
        f for w in parse_command_line(line).words if w.startswith("rootflags=") for f in w[10:].split(",")
    ]
    return _subvolume_of(flags)


def _subvolume_of(options: Sequence[str]) -> str:
    named = [o.removeprefix("subvol=").strip("/") for o in options if o.startswith("subvol=")]
    return named[-1] if named else ""


def _subvolume_here(machine: Machine) -> str:
    """The subvolume of /: of the kernel that runs, else as it is mounted; of a tree, as its own files say."""
    if machine.running:
        named = subvolume(machine.peek("/proc/cmdline"))
        return named or _mounted_subvolume(machine.peek("/proc/self/mountinfo"))
    default = _default_of_tree(machine)
    lines = [bls.options(default), bls.file_line(machine.peek(KERNEL_CMDLINE))]
    rows = [x.split() for x in machine.peek("/etc/fstab").splitlines()]
    root = [r[3].split(",") for r in rows if len(r) > 3 and r[1] == "/"]
    return next((s for s in [*map(subvolume, lines), *map(_subvolume_of, root)] if s), "")


def _mounted_subvolume(mountinfo: str) -> str:
    """The subvolume that is mounted as /: the last line for it counts. Source: proc_pid_mountinfo(5)."""
    rows = [x.split() for x in mountinfo.splitlines()]
    root = [r for r in rows if len(r) > 4 and r[4] == "/" and "btrfs" in r]
    return root[-1][3].strip("/") if root else ""


def _default_of_tree(machine: Machine) -> str:
    """The entry that loader.conf of a tree names, empty where it names none, or one of those that match."""
    for folder in BOOT_FOLDERS:
        wanted = bls.value(machine.peek(f"{folder}/loader/loader.conf"), "default").removesuffix(".conf")
        files = (
            [n for n in entry_files(machine, (folder,)) if fnmatchcase(_stem(n), wanted)] if wanted else []
        )
        if len(files) == 1:
            return entry_text(machine, files[0])
    return ""


def _stem(name: str) -> str:
    """What a loader calls an entry: boot counting puts +LEFT-DONE behind the name of its file."""
    return re.sub(r"\+\d+(?:-\d+)?\Z", "", name.rpartition("/")[2].removesuffix(".conf"))


def _root_words(text: str) -> list[str]:
    """What tells the root file system and how it is found; of its flags only the subvolume."""
    words = parse_command_line(text).words
    root = [w for w in words if w.startswith("root=")][-1:]
    flags = [f for w in words if w.startswith("rootflags=") for f in re.split("[=,]", w) if "/" in f]
    # casper and live: a rescue system that shares the partition
    boot = [w for w in words if w.startswith("boot=")][-1:]
    return [*root, *flags, *boot]


def bls_entry(name: str, text: str, line: str, ours: bool) -> BootEntry:
    """An entry as `grubcfg` describes those of GRUB; `line` is its command line after the loader's own reading."""
    stem = _stem(name)
    at = next((n for n, x in enumerate(text.split("\n"), 1) if x.lstrip().startswith("options")), 1)
    version = bls.value(text, "version").rpartition("@")[2]
    words = parse_command_line(line).words
    title = bls.value(text, "title") or stem
    return BootEntry((title,), (stem,), (0,), bls.value(text, "linux"), words, at, False, ours, version)


def _default(machine: Machine, entries: Sequence[BootEntry]) -> BootEntry | None:
    """The entry that boots by itself: as bootctl says, else the one that started this boot, else its kernel's.

    In a tree: as loader.conf says, else the first one of systemd-boot's menu.
    """
    from emupmem import detect

    ours = [e for e in entries if e.ours]
    wanted = [default_id(machine), efi_text(machine, SELECTED)] if machine.running else detect.menu(machine)
    names = [re.sub(r"[^\x20-\x7e]", "", n).removesuffix(".conf") for n in wanted]
    by_name = [e for n in names if n for e in ours if e.ids[0] == n]
    release = machine.peek("/proc/sys/kernel/osrelease") if machine.running else ""
    by_kernel = [e for e in ours if release and e.version == release]
    return next(iter([*by_name, *by_kernel, *ours]), None)


def default_id(machine: Machine) -> str:
    """What bootctl calls the default (an entry's file, or a unified kernel image's), empty where it does not."""
    done = machine.output(*BOOTCTL_LIST) if machine.running else None
    if done is None or done.status:
        return ""
    try:
        listed = json.loads(done.stdout)
        return next((str(e.get("id", "")) for e in listed if e.get("isDefault")), "")
    except (ValueError, AttributeError, TypeError):
        return ""


def _no_entries(machine: Machine, what: str) -> EmupmemError:
    if not machine.is_root:
        return EmupmemError("the boot entries are shown to root only", "run it with sudo")
    return EmupmemError(
        f"there are no boot entries that start this system from {what}",
        "mount the boot partition if it is not mounted (bootctl status names it)",
    )


def _snapshots_kept(count: int) -> tuple[str, ...]:
    what = (
        "1 entry of another snapshot keeps its"
        if count == 1
        else f"{count} entries of other snapshots keep their"
    )
    return (f"{what} words",) if count else ()


class SystemdBoot(Loader):
    """systemd-boot, its entries as kernel-install or a person wrote them.

    The entries are rewritten by rename, one after the other: each is whole at every moment. What new kernels
    take their words from is kept in step: /etc/kernel/cmdline.
    """

    title = "systemd-boot"
    back = "in the boot menu (hold Space at the start) press e on the entry, delete {memmap}, press Enter"

    def standing(self, machine: Machine) -> Standing:
        running = _own_line(machine)
        entries: list[BootEntry] = []
        menu, others = "", 0
        for name in entry_files(machine):
            text = entry_text(machine, name)
            ours = _belongs_here(machine, name, text, running)
            menu = menu or name.rpartition("/")[0]
            others += not ours and _is_of_another_snapshot(machine, text)
            if bls.value(text, "linux"):
                entries.append(bls_entry(name, text, bls.options(text), ours))
        if not any(e.ours for e in entries):
            raise _no_entries(machine, "systemd-boot")
        default = _default(machine, entries)
        items, where = _source_items(machine, default)
        text = bls.options(_text(machine, file)) if (file := trial_file(machine)) else ""
        words = parse_command_line(text).words
        chosen = trial_chosen(machine)
        return Standing(items, where, menu, tuple(entries), default, words, chosen, _snapshots_kept(others))

    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        from emupmem import detect

        standing = self.standing(machine)
        made = standing.default.text if standing.default and detect.has(machine, "kernel-install") else None
        edits = list(_source_edits(machine, made, items, extra, drop))
        ours = self._ours(machine)
        for name in ours:
            before = entry_text(machine, name)
            after = bls.rework_entry(before, items, extra, drop)
            bls.prove(bls.options(before), bls.options(after), items, extra, drop)
            edits.append(_edit(machine, name, after))
        trial = trial_file(machine)  # the last one: while it is there, a confirm can be finished
        edits += [FileEdit(trial, machine.read(trial), None)] if trial else []
        forget = (FORGET_TRIAL,) if trial_chosen(machine) else ()
        return Steps(_changed(edits), forget, torn=_torn(machine, ours))

    def _ours(self, machine: Machine) -> list[str]:
        running = _own_line(machine)
        return [n for n in entry_files(machine) if _belongs_here(machine, n, entry_text(machine, n), running)]

    def refuse(self, machine: Machine) -> None:
        from emupmem import detect

        if machine.running and efi_text(machine, SELECTED).endswith(".efi"):
            raise Refused(detect.unified(machine, started=True))
        if detect.boots_image(machine):
            raise Refused(detect.unified(machine, started=False))

    def refuse_trial(self, machine: Machine) -> None:
        from emupmem import oneshot

        oneshot.refuse(machine)


def _source_items(machine: Machine, default: BootEntry | None) -> tuple[tuple[str, ...], str]:
    """Our items where new kernels take them from, and its name; without such a file the default entry itself."""
    data = _source(machine)
    if data is not None:
        text = data.decode("utf-8", "surrogateescape")
        return tuple(i.text for i in parse_command_line(bls.file_line(text)).reservations), KERNEL_CMDLINE
    items = tuple(i.text for i in default.command_line.reservations) if default is not None else ()
    return items, "the boot entries"


def source_files(machine: Machine) -> list[str]:
    """The files that new kernels' words come from, where they are not GRUB's."""
    names = (KERNEL_CMDLINE, VENDOR_CMDLINE, *_dropins(machine), "/etc/kernel/entry-token", "/etc/machine-id")
    return [n for n in names if machine.exists(n)]


def _dropins(machine: Machine) -> list[str]:
    return [f"{CMDLINE_D}/{n}" for n in machine.names(CMDLINE_D) if n.endswith((".conf", ".cfg"))]


def _source(machine: Machine) -> bytes | None:
    """/etc/kernel/cmdline; of one that a program tore when it was killed, what it was before."""
    torn = _source_is_torn(machine)
    return backups.read_aside(machine, KERNEL_CMDLINE) if torn else machine.read(KERNEL_CMDLINE)


def _source_is_torn(machine: Machine) -> bool:
    """Whether it is empty, and a copy or a record says that it was not."""
    data = machine.read(KERNEL_CMDLINE)
    empty = data is not None and not data.strip(b"\0 \t\r\n")
    return empty and (backups.is_aside(machine, KERNEL_CMDLINE) or bool(made_records(machine)))


def _source_edits(
    machine: Machine, made: str | None, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> list[FileEdit]:
    """What keeps the source of new kernels' command lines in step with the entries.

    `made` are the words to make it of where there is none, None where it is not needed.
    """
    edits = []
    for name in _dropins(machine):
        if name.startswith(FORMER_DROPIN):
            edits.append(FileEdit(name, machine.read(name), None))
        elif parse_command_line(bls.file_line(_text(machine, name))).reservations:
            raise EmupmemError(f"{name} reserves memory already", "take that out of it first")
    return edits + _main_source_edits(machine, made, items, extra, drop)


def _main_source_edits(
    machine: Machine, made: str | None, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> list[FileEdit]:
    data = _source(machine)
    if data is None:
        return [_made_source(machine, made, items, extra, drop)] if made is not None and items else []
    # While this boot still has the reservation, kernel-install would take it from /proc/cmdline.
    booted = parse_command_line(machine.peek("/proc/cmdline")).reservations if machine.running else ()
    if not items and not booted and made_by_us(machine, data):
        return [FileEdit(KERNEL_CMDLINE, data, None)]
    return [FileEdit(KERNEL_CMDLINE, data, _reworked_file(data, items, extra, drop))]


def kept_source(machine: Machine, standing: Standing) -> list[FileEdit]:
    """What keeps new kernels from taking their words from the boot that runs, where they would."""
    default = standing.default
    from emupmem import detect

    needed = detect.has(machine, "kernel-install") and machine.read(VENDOR_CMDLINE) is None
    if default is None or not needed or machine.exists(KERNEL_CMDLINE):
        return []
    return [_made_source(machine, default.text, ())]


def _made_source(
    machine: Machine, line: str, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
) -> FileEdit:
    """An /etc/kernel/cmdline where there is none: without it new kernels take the words of the running boot."""
    vendor = machine.read(VENDOR_CMDLINE)
    text = vendor.decode("utf-8", "surrogateescape") if vendor is not None else line
    kept = [w for w in bls.raw_words(bls.file_line(text)) if not w.startswith(KERNEL_INSTALL_ADDS)]
    text = bls.reworked(" ".join(kept), items, extra, drop) + "\n"
    return FileEdit(KERNEL_CMDLINE, None, text.encode("utf-8", "surrogateescape"))


def _reworked_file(data: bytes, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]) -> bytes:
    before = data.decode("utf-8", "surrogateescape")
    after = bls.rework_file(before, items, extra, drop)
    bls.prove(bls.file_line(before), bls.file_line(after), items, extra, drop)
    return after.encode("utf-8", "surrogateescape")


def bare(data: bytes, drop: Sequence[str]) -> bytes:
    """What such a file is without our words."""
    return _reworked_file(data, (), (), drop)


def made_by_us(machine: Machine, data: bytes) -> bool:
    """Whether /etc/kernel/cmdline is a file that an apply of ours made where there was none."""
    return any(machine.read(n) == data for n in made_records(machine))


def made_records(machine: Machine) -> list[str]:
    """The records of such files."""
    names = machine.names(BACKUPS)
    return [f"{BACKUPS}/{n}" for n in names if n.startswith("cmdline.") and n.endswith(".made")]


class SdBootUtil(SystemdBoot):
    """openSUSE with systemd-boot or grub2-bls: sdbootutil writes the entries from /etc/kernel/cmdline.

    By its own program, since that also renews what a TPM is told of the command line.
    """

    title = "sdbootutil"
    back = "in the boot menu press e on the entry, delete {memmap}, go on; or choose an older snapshot"

    def refuse_trial(self, machine: Machine) -> None:
        Loader.refuse_trial(self, machine)  # its entries may be GRUB's

    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        wanted = super().steps(machine, items, extra, drop)
        sources = tuple(e for e in wanted.edits if e.name.startswith("/etc/kernel/"))
        if not wanted.edits:
            return Steps(torn=wanted.torn)
        command = Command(("sdbootutil", _sdbootutil_verb(machine)), "write the boot entries anew")
        # Of the older verb, and of one that goes wrong, no entry is safe.
        return Steps(sources, (command,), tuple(entry_files(machine)), (command,), wanted.torn)


def _sdbootutil_verb(machine: Machine) -> str:
    """`update-all-entries` writes the options only; versions before it write whole entries."""
    done = machine.output("sdbootutil", "--help")
    has = done is not None and b"update-all-entries" in done.stdout + done.stderr
    return "update-all-entries" if has else "add-all-kernels"


class GrubBls(Loader):
    """GRUB that takes its entries from /boot/loader/entries (Fedora, RHEL 8 and later): grubby changes them.

    grubby deletes every argument of the same name, so it is given the whole merged `memmap=` list.
    /etc/default/grub and /etc/kernel/cmdline, which new kernels and grub2-mkconfig read, are kept in step.
    """

    title = "GRUB with BLS entries"
    back = "in GRUB's menu (hold Shift or press Esc at the start) press e, delete {memmap}, press Ctrl-x"
    folders = ("/boot",)

    def standing(self, machine: Machine) -> Standing:
        variables = tuple(environment.grubenv(machine).items())
        entries = []
        for name in entry_files(machine, self.folders):
            text = entry_text(machine, name)
            line = bls.grub_line(bls.options(text), variables)
            if bls.value(text, "linux"):
                entries.append(bls_entry(name, text, line, True))
        if not entries:
            raise _no_entries(machine, "GRUB")
        saved = environment.grubenv(machine).get("saved_entry", "")
        default = next((e for e in entries if saved in (e.ids[0], e.title)), None) or _default(
            machine, entries
        )
        items = tuple(i.text for i in default.command_line.reservations) if default is not None else ()
        return Standing(items, "the boot entries", "/boot/loader/entries", tuple(entries), default)

    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        standing = self.standing(machine)
        files, env = entry_files(machine, self.folders), environment.grubenv_name(machine)
        torn = (*_torn(machine, files), *([env] if environment.torn_grubenv(machine) else []))
        edits = [*self._defaults(machine, items, extra, drop)]
        source = _source_edits(machine, self._new_kernels(machine, standing), items, extra, drop)
        # Since 8.40-47.el8 grubby makes that file where there is none, of the words of the oldest entry.
        edits += source or [FileEdit(KERNEL_CMDLINE, None, None)]
        wrong = [e for e in standing.entries if self._differs(e.command_line, items, extra, drop)]
        if not wrong:
            return Steps(_changed(edits), torn=torn)
        # It writes both files as well, the second one's first line only: afterwards they are as they should be.
        command = self._grubby(machine, standing, items, extra, drop)
        return Steps(tuple(edits), (command,), (*files, env), torn=torn)

    def _new_kernels(self, machine: Machine, standing: Standing) -> str:
        """The words of the default entry without those that TuneD adds to each entry by itself."""
        known = tuple((k, v) for k, v in environment.grubenv(machine).items() if k not in MAY_BE_UNSET)
        names = entry_files(machine, self.folders)
        default = standing.default.ids if standing.default else ()
        name = next((n for n in names if n.rpartition("/")[2].removesuffix(".conf") in default), names[0])
        return bls.grub_line(bls.options(entry_text(machine, name)), known)

    def _differs(
        self, line: CommandLine, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
    ) -> bool:
        return (
            bool(bls.wrong_line(line, items))
            or any(w not in line.words for w in extra)
            or any(w in line.words for w in drop)
        )

    def _defaults(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
    ) -> list[FileEdit]:
        """What grub2-mkconfig --update-bls-cmdline, and on RHEL 8 any grub2-mkconfig, would write over the entries."""
        from emupmem import survey
        from emupmem.editor import defaults
        from emupmem.editor import text as editor_text

        before = machine.read(GRUB_DEFAULT)
        if before is None:
            return []
        sh = survey.judge(machine)
        after = defaults.set_items(before, editor_text.LINUX, items, extra, drop, sh=sh)
        if after != before:
            defaults.prove(before, after, editor_text.LINUX, items, extra_words=extra, drop_words=drop, sh=sh)
        return [FileEdit(GRUB_DEFAULT, before, after)]

    def _grubby(
        self,
        machine: Machine,
        standing: Standing,
        items: Sequence[str],
        extra: Sequence[str],
        drop: Sequence[str],
    ) -> Command:
        _refuse_unset(machine, entry_files(machine, self.folders))
        others = {bls.foreign_items(e.command_line) for e in standing.entries}
        if len(others) > 1:
            raise EmupmemError(
                "the boot entries differ in their memmap= arguments, and grubby can only make all the same",
                "make them the same first: grubby --info=ALL shows them",
            )
        merged = [*next(iter(others)), *items]
        odd = next(
            (w for e in standing.entries for w in bls.foreign_words(e.command_line) if _mangled(w)), ""
        )
        if odd:
            raise EmupmemError(
                f"the boot entries have the word {odd}, which grubby does not keep as it is",
                "grubby writes with sed: \\, $, & and quotes get lost; change the entries by hand",
            )
        added = [*([f"memmap={','.join(merged)}"] if merged else []), *extra]
        gone = [*([] if merged else ["memmap"]), *drop]
        argv = ["grubby", "--update-kernel=ALL"]
        argv += [f"--args={' '.join(added)}"] if added else []
        argv += [f"--remove-args={' '.join(gone)}"] if gone else []
        argv += ["--no-etc-grub-update"] if _knows(machine, "--no-etc-grub-update") else []
        return Command(tuple(argv), "change the boot entries")

    def refuse(self, machine: Machine) -> None:
        if not machine.live and not machine.running:
            raise EmupmemError(
                "GRUB takes its entries from /boot/loader/entries here (BLS): grubby changes them, on that machine",
                "run emupmem there",
            )
        if machine.live and machine.find("grubby") is None:
            raise EmupmemError(
                "GRUB takes its entries from /boot/loader/entries here (BLS), and grubby is not installed",
                "dnf install grubby",
            )


def _refuse_unset(machine: Machine, names: Sequence[str]) -> None:
    """Raise EmupmemError for an entry whose words are in a variable that GRUB's environment block does not set.

    grubby changes the variable there, or nothing at all, and what the menu sets instead is not seen here.
    """
    known = {**dict.fromkeys(MAY_BE_UNSET, ""), **environment.grubenv(machine)}
    for name in names:
        unset = next((v for v in bls.variables(bls.options(entry_text(machine, name))) if v not in known), "")
        if unset:
            raise EmupmemError(
                f"{name} takes its words from ${unset}, which {environment.grubenv_name(machine)} does not set",
                f"set it there: grub2-editenv {environment.grubenv_name(machine)} set '{unset}=root=… ro …'",
                state=UNCHANGED,
            )


def _mangled(word: str) -> bool:
    """Whether sed or grubby's word splitting would change a word (update_args, set_bls_value), or GRUB then."""
    return any(c in word for c in "\\$&\"'*?[ \t")


def _knows(machine: Machine, option: str) -> bool:
    """Whether this grubby has an option: those that write /etc/default/grub too can be told not to."""
    done = machine.output("grubby", "--help")
    return done is not None and option.encode() in done.stdout + done.stderr


class RpmOstree(Loader):
    """rpm-ostree: kernel arguments belong to a deployment; a change makes a new one, the old one stays in the menu."""

    title = "rpm-ostree"
    back = "in the boot menu choose the deployment before this one"

    def standing(self, machine: Machine) -> Standing:
        line = self._arguments(machine)
        words = parse_command_line(line).words
        entry = BootEntry(("next deployment",), ("",), (0,), "", words, 1, False, True)
        items = tuple(i.text for i in entry.command_line.reservations)
        kernel = machine.peek("/proc/sys/kernel/osrelease")
        entry = replace(entry, version=kernel)
        return Standing(items, "rpm-ostree kargs", "rpm-ostree kargs", (entry,), entry)

    def _arguments(self, machine: Machine) -> str:
        done = machine.output(*KARGS, timeout=60)
        if done is None:
            raise Refused(BOOTC)
        lines = [x for x in done.stdout.decode("utf-8", "surrogateescape").splitlines() if x.strip()]
        if done.status or not lines:
            raise EmupmemError(f"rpm-ostree kargs failed with status {done.status}: {done.last_words}")
        return lines[-1]  # versions before 2020 print a heading first

    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        old = self._arguments(machine)
        new = bls.reworked(old, items, extra, drop)
        bls.prove(old, new, items, extra, drop)
        gone, added = _difference(bls.raw_words(old), bls.raw_words(new))
        if not gone and not added:
            return Steps()
        return Steps(
            (),
            (_kargs(gone, added, "make a deployment with the new arguments"),),
            (),
            (_kargs(added, gone, "take that back"),),
        )

    def refuse(self, machine: Machine) -> None:
        if not machine.running:
            raise EmupmemError(
                "this is the tree of an ostree system: kernel arguments belong to its deployments",
                "run emupmem on that machine",
            )
        self._arguments(machine)


def _difference(old: Sequence[str], new: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words only in old, words only in new), each as often as it is there more often."""
    gone, added = list(old), []
    for word in new:
        if word in gone:
            gone.remove(word)
        else:
            added.append(word)
    return gone, added


def _kargs(gone: Sequence[str], added: Sequence[str], why: str) -> Command:
    argv = ("rpm-ostree", "kargs", *(f"--delete={w}" for w in gone), *(f"--append={w}" for w in added))
    return Command(argv, why)


def problems(
    before: Standing, after: Standing, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> str:
    """What is wrong after a change, the first thing; empty where all entries are as planned and else as before."""
    wrong = grubcfg.problems(after.entries, items, items)
    if wrong:
        entry, why = wrong[0]
        return f"{after.menu}{f': {entry.ids[-1] or entry.title}' if entry else ''}: {why}"
    old = {e.ids: e for e in before.entries}
    for entry in after.entries:
        was = old.get(entry.ids)
        if was is None:
            continue
        wanted = [w for w in bls.foreign_words(was.command_line) if not (was.ours and w in drop)]
        wanted += [w for w in extra if was.ours and w not in wanted]
        if sorted(bls.foreign_words(entry.command_line)) != sorted(wanted):
            return f"{after.menu}: {entry.ids[-1] or entry.title}: other words of it were changed"
        if entry.kernel != was.kernel:
            return f"{after.menu}: {entry.ids[-1] or entry.title}: it starts another kernel"
    if len(after.entries) < len(before.entries):
        return f"{after.menu}: entries are gone"
    return ""
