# SPDX-License-Identifier: Apache-2.0
"""The text of the one systemd unit that mounts at every boot, and reading it back. Pure.

The unit is all the state there is of a mount: what it starts is what was asked. One process does
all mounts, one after the other, so that a failing one hides neither itself (the unit is then
`failed`, the boot goes on) nor the others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from emupmem.kernel.cmdline import format_item, parse_memmap_value
from emupmem.model import DeviceKind, EmupmemError, Reservation
from emupmem.record import record
from emupmem.units import tight

NAME = "emupmem.service"
FILE = f"/etc/systemd/system/{NAME}"
LINK = f"/etc/systemd/system/multi-user.target.wants/{NAME}"
COMMAND = "boot-mount"
"""The hidden command that the unit runs: its arguments are one group of `WORDS` for each mount, and of two words,
the range and its kind, for each device of soft reserved memory."""

SAVE_COMMAND = "boot-save"
"""The hidden command that the unit runs when it is stopped, where content is kept: the same arguments."""

SOME_FAILED = 3
"""Exit status of `boot-mount` where a mount failed and another one keeps its content: the unit must stay
active then, or nothing would be saved when it is stopped."""

UNSAVED, SIDECAR = ".unsaved", ".emupmem"
"""How the files beside an image end: which boot's content is still to be saved to it; its checksum."""

WORDS = 6
SECONDS = 30
"""How long the command waits for a device."""

SLOWEST = 50 << 20
"""Bytes a second that a disk surely reads and writes: the time limits count on it."""

_SLOWEST_ONLINE = 1 << 30
"""Bytes a second that a kernel surely takes as memory, or gives back."""

KEEP_UNIT = """\
# Logins wait for the content to be back, and are over before it is saved.
Before=systemd-user-sessions.service
"""
KEEP_SERVICE = f"""\
# One mount has failed, and the content of another one is still to be saved.
SuccessExitStatus={SOME_FAILED}
"""

MARK = "# Written by emupmem"
_MOUNTS = (
    "mounts emulated persistent memory at every boot. Its",
    "File systems on emulated, volatile persistent memory",
)
_ALL = ("sets up what memmap= reserves, at every boot. The", "Emulated, volatile memory devices")
TEXT = f"""{MARK}: @WHAT@ content is volatile.
# `emupmem remove` takes this file away. A failure here never stops the boot.
[Unit]
Description=@TITLE@
# Without any memmap= there is nothing to do. Which one it must be is judged by the command.
ConditionKernelCommandLine=memmap
# Nothing to start where emupmem was taken away: then the boot has no failed unit either.
ConditionFileIsExecutable=@PROGRAM@
After=local-fs.target
@UNIT@
[Service]
Type=oneshot
RemainAfterExit=yes
# {SECONDS} seconds to wait for each device, the rest for the file systems.
TimeoutStartSec=@SECONDS@
ExecStart=@COMMAND@
@SERVICE@
[Install]
WantedBy=multi-user.target
"""


@record
class BootMount:
    """What to mount at every boot. The device is known by its physical range (bytes), never by its name.

    `owner` is `USER` or `USER:GROUP`, `mode` an octal number; empty where they shall stay as they are.
    `keep` is the image that the content is saved to and brought back from, empty where it is not kept.
    """

    start: int
    size: int
    dir: str
    fs: str
    owner: str = ""
    mode: str = ""
    keep: str = ""

    @property
    def range(self) -> str:
        """The range as the kernel command line says it: `1G!4G`."""
        return f"{tight(self.size)}!{tight(self.start)}"

    @property
    def failed(self) -> str:
        """What is not so where it failed."""
        return f"{self.dir} is not mounted"


@record
class BootDevice:
    """What a range is to be at every boot, known by its physical addresses (bytes).

    `dax` or `memory`, which are soft reserved memory, or `devdax`, which is persistent memory.
    """

    start: int
    size: int
    kind: DeviceKind

    @property
    def range(self) -> str:
        """The range as the kernel command line says it: `1G%4G-1+0xefffffff`, or `1G!4G`."""
        return format_item(Reservation(self.start, self.size, 1, kind=self.kind))

    @property
    def failed(self) -> str:
        """What is not so where it failed."""
        return f"memmap={self.range} is not set up as {self.kind}"


AtBoot = BootMount | BootDevice
_KINDS = (DeviceKind.DEVDAX, DeviceKind.DAX, DeviceKind.MEMORY)


@record
class UnitChange:
    """The unit file before and after; None where there is none. `linked` says whether it is enabled already."""

    before: str | None
    after: str | None
    linked: bool = False

    @property
    def needed(self) -> bool:
        return self.before != self.after or self.linked != (self.after is not None)

    @property
    def diff(self) -> str:
        """A unified diff, empty when the text stays as it is."""
        old, new = ((t or "").splitlines(keepends=True) for t in (self.before, self.after))
        was, will = ("/dev/null" if t is None else FILE for t in (self.before, self.after))
        return "".join(difflib.unified_diff(old, new, was, will))

    @property
    def mounts(self) -> tuple[BootMount, ...]:
        """What is mounted at every boot afterwards. Raises EmupmemError where the unit was edited."""
        return read_unit(self.after) if self.after is not None else ()

    @property
    def devices(self) -> tuple[BootDevice, ...]:
        """The same of what becomes another device."""
        return read_devices(self.after) if self.after is not None else ()


NO_CHANGE = UnitChange(None, None)


def unit_text(wanted: Sequence[AtBoot], program: str) -> str:
    """The unit that runs `program` (an absolute path) for these mounts and devices.

    Raises EmupmemError for a word that no unit file can hold.
    """
    if not re.fullmatch(r"(/[\w.+@:=,~-]+)+", program, re.ASCII):
        raise EmupmemError(f"{program} cannot be started by systemd", "install emupmem in /usr/local/bin")
    kept = [m for m in wanted if isinstance(m, BootMount) and m.keep]
    seconds = 300 + sum(m.size for m in kept) // SLOWEST
    seconds += sum(m.size for m in wanted if isinstance(m, BootDevice)) // _SLOWEST_ONLINE
    what, title = _MOUNTS if all(isinstance(m, BootMount) for m in wanted) else _ALL
    unit, service = "", ""
    if kept:
        folders = " ".join(dict.fromkeys(quote(m.keep.rpartition("/")[0] or "/", "%") for m in kept))
        unit = f"{KEEP_UNIT}RequiresMountsFor={folders}\n"
        service = (
            f"{KEEP_SERVICE}TimeoutStopSec={seconds}\nExecStop={_command(program, SAVE_COMMAND, kept)}\n"
        )
    parts = {
        "@PROGRAM@": program,
        "@WHAT@": what,
        "@TITLE@": title,
        "@UNIT@": unit,
        "@SECONDS@": str(seconds),
        "@COMMAND@": _command(program, COMMAND, wanted),
        "@SERVICE@": service,
    }
    return re.sub("|".join(parts), lambda m: parts[m[0]], TEXT)


def _command(program: str, command: str, wanted: Sequence[AtBoot]) -> str:
    return " \\\n    ".join([f"{program} {command}", *(_arguments(m) for m in wanted)])


def _arguments(mount: AtBoot) -> str:
    if isinstance(mount, BootDevice):
        return f"{quote(mount.range)} {mount.kind}"
    words = (mount.range, mount.dir, mount.fs, mount.owner or "-", mount.mode or "-", mount.keep or "-")
    return " ".join(quote(w) for w in words)


def quote(word: str, double: str = "%$") -> str:
    r"""One argument of ExecStart= by systemd's rules: quotes, `\` and `"` escaped, `%` and `$` doubled.

    In paths of other settings only `%` is doubled.

    Raises EmupmemError for control characters and what is not text.
    Source: systemd.syntax(7), systemd.service(5) "Command lines", systemd.unit(5) "Specifiers".
    """
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in word):
        raise EmupmemError(f"{word!r} has a character that no unit file can hold", "choose another name")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    for sign in double:
        escaped = escaped.replace(sign, 2 * sign)
    return f'"{escaped}"'


def read_unit(unit: str) -> tuple[BootMount, ...]:
    """The mounts of a unit that `unit_text` made. Raises EmupmemError where it was edited beyond recognition."""
    return tuple(m for m in read_all(unit) if isinstance(m, BootMount))


def read_devices(unit: str) -> tuple[BootDevice, ...]:
    """The devices that are not mounted of such a unit. Raises EmupmemError as `read_unit` does."""
    return tuple(m for m in read_all(unit) if isinstance(m, BootDevice))


def read_all(unit: str) -> tuple[AtBoot, ...]:
    """The mounts and the devices of such a unit. Raises EmupmemError as `read_unit` does."""
    return from_words(_start_words(unit)[2:])


def read_program(unit: str) -> str:
    """The program that such a unit starts. Raises EmupmemError, as `read_unit`."""
    return _start_words(unit)[0]


def _start_words(unit: str) -> list[str]:
    """The words of ExecStart: the program, its command, the mounts and devices."""
    hint = f"sudo rm {FILE} {LINK} deletes it; then give the mounts again"
    joined = re.sub(r"\\\n", " ", unit)
    commands = [line[len("ExecStart=") :] for line in joined.split("\n") if line.startswith("ExecStart=")]
    if len(commands) != 1 or not unit.startswith(MARK):
        raise EmupmemError(f"{FILE} is not one of emupmem's", hint)
    quoted = re.findall(r'"(?:[^"\\]|\\.)*+"?|[^\s"]+', commands[0])
    if quoted and quoted[-1].startswith('"') and not re.fullmatch(r'"(?:[^"\\]|\\.)*+"', quoted[-1]):
        raise EmupmemError(f"{FILE} was edited: a quote of its ExecStart is not closed", hint)
    words = [_unquote(w) for w in quoted]
    if len(words) < 2 or words[1] != COMMAND:
        raise EmupmemError(f"{FILE} was edited: its ExecStart is not emupmem's", hint)
    return words


def _unquote(word: str) -> str:
    if word.startswith('"'):
        word = re.sub(r"\\(.)", r"\1", word[1:-1])
    return word.replace("%%", "%").replace("$$", "$")


def from_words(words: Sequence[str]) -> tuple[AtBoot, ...]:
    """The mounts and devices that the arguments of the boot command name. Raises EmupmemError."""
    found: list[AtBoot] = []
    left = tuple(words)
    while left or not found:
        count = 2 if left[1:2] and left[1] in _KINDS else WORDS
        group, left = left[:count], left[count:]
        if len(group) < count:
            raise EmupmemError(f"{COMMAND} needs groups of RANGE DIR FS OWNER MODE KEEP, or RANGE KIND")
        found.append(_device_of(*group) if count == 2 else _from_group(group))
    return tuple(found)


def _device_of(where: str, kind: str) -> BootDevice:
    items = parse_memmap_value(where)
    wanted = DeviceKind(kind)
    if len(items) != 1 or not items[0].reserves or items[0].soft is not wanted.soft:
        raise EmupmemError(
            f"{where!r} is not a range such as {'1G%4G-1+0xefffffff' if wanted.soft else '1G!4G'}"
        )
    return BootDevice(items[0].start, items[0].size, wanted)


def _from_group(group: Sequence[str]) -> BootMount:
    where, folder, fs, owner, mode, keep = group
    items = parse_memmap_value(where)
    if len(items) != 1 or items[0].op != "!":
        raise EmupmemError(f"{where!r} is not a range such as 1G!4G")
    owner, mode, keep = (("" if w == "-" else w) for w in (owner, mode, keep))
    return BootMount(items[0].start, items[0].size, folder, fs, owner, mode, keep)


def changed(
    before: str | None,
    linked: bool,
    reserved: Sequence[tuple[int, int]],
    program: str,
    new: Sequence[AtBoot],
    soft: Sequence[tuple[int, int]] = (),
    plain: Sequence[tuple[int, int]] = (),
) -> UnitChange:
    """The unit once `reserved` (pairs start, size) is what the machine reserves and `new` is asked as well.

    `reserved` is persistent memory, `soft` soft reserved. What is of ranges that are no longer reserved goes, and the
    devdax devices of those that are `plain` now; what is new takes the place of that of its range. Raises
    EmupmemError for two mounts in one folder, two contents in one image, and an image on one of the devices.
    """
    present = read_all(before) if before is not None else ()
    present = tuple(m for m in present if not is_plain(m, plain))
    taken = {(m.start, m.size) for m in new}
    kept = [m for m in present if belongs_to(m, reserved, soft) and (m.start, m.size) not in taken]
    mounts = sorted([*kept, *new], key=lambda m: m.start)
    folders = [m.dir for m in mounts if isinstance(m, BootMount)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise EmupmemError(f"two devices cannot both be mounted at {folder}", "give each its own folder")
    if new:
        _refuse_one_image([m for m in mounts if isinstance(m, BootMount)])
    if not mounts:
        return UnitChange(before, None, linked)
    return UnitChange(before, unit_text(mounts, program), linked)


def _refuse_one_image(mounts: Sequence[BootMount]) -> None:
    """Raise EmupmemError for an image that would not be there, or not be its own, at the next boot."""
    kept = [m for m in mounts if m.keep]
    for one in kept:
        inside = next((m.dir for m in mounts if one.keep.startswith(f"{m.dir}/")), "")
        if inside:
            raise EmupmemError(
                f"{one.keep} would be on the device that is mounted at {inside}, which forgets as well",
                "keep it on a disk",
            )
        beside = (one.keep, f"{one.keep}{UNSAVED}", f"{one.keep}{SIDECAR}")
        if any(other.keep in beside for other in kept if other is not one):
            raise EmupmemError(
                f"two devices cannot both be kept in {one.keep}", "give each a file of its own"
            )


def belongs_to(one: AtBoot, reserved: Sequence[tuple[int, int]], soft: Sequence[tuple[int, int]]) -> bool:
    """Whether its range is among those (pairs start, size) that are reserved for its kind."""
    return (one.start, one.size) in (soft if isinstance(one, BootDevice) and one.kind.soft else reserved)


def is_plain(one: AtBoot, plain: Sequence[tuple[int, int]]) -> bool:
    """Whether it is a devdax device of a range that is to be a plain one now."""
    return isinstance(one, BootDevice) and (one.start, one.size) in plain
