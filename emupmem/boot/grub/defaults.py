# SPDX-License-Identifier: Apache-2.0
"""GRUB's defaults on a machine: all their files, what they come to, what of it is ours."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.boot.grub import dropin, menu
from emupmem.boot.grub.environment import GRUB_DEFAULT, GRUB_DROPINS
from emupmem.editor import defaults, edits, quoting, shell
from emupmem.editor import text as editor_text
from emupmem.editor.shell import Judge
from emupmem.kernel.cmdline import OUR_WORDS, RESERVATION, half_written, mangled, parse_command_line
from emupmem.model import UNCHANGED, CommandLine, EmupmemError, FileEdit
from emupmem.planner.survey import GRUB_MKCONFIGS
from emupmem.system.backups import BACKUPS
from emupmem.system.distribution import OS_RELEASE, families
from emupmem.system.host import Host
from emupmem.units import human

# What to change -----------------------------------------------------------------------------------


def read_defaults(machine: Host) -> bytes:
    """The text of /etc/default/grub. Raises EmupmemError where there is none."""
    data = machine.read(GRUB_DEFAULT)
    if data is None:
        raise EmupmemError(
            f"there is no {GRUB_DEFAULT}: this machine is not started by a GRUB that grub-mkconfig sets up",
            "emupmem changes such machines only",
        )
    return data


def effective_line(machine: Host, main: bytes) -> CommandLine:
    """The kernel command line that GRUB's defaults give a normal entry, drop-ins included."""
    values = effective_defaults(machine, main)
    return parse_command_line(
        " ".join(menu.kernel_text(values[v].value or "") for v in editor_text.VARIABLES)
    )


def effective_defaults(
    machine: Host, main: bytes, own: bytes | bool | None = True
) -> dict[str, defaults.Effective]:
    """What GRUB's defaults come to with `main` as /etc/default/grub, and `own` as our drop-in.

    `own` is True for the one that is there, None for none.
    """
    texts = dict(grub_texts(machine)) | {GRUB_DEFAULT: main}
    if own is not True:
        texts.pop(dropin.NAME, None)
        texts |= {dropin.NAME: own} if isinstance(own, bytes) else {}
    order = [GRUB_DEFAULT, *sorted(n for n in texts if n != GRUB_DEFAULT)]
    return defaults.effective([(n, texts[n]) for n in order], sh=judge_of(machine))


def refuse_half_written(line: CommandLine) -> None:
    """Raise EmupmemError for an item that is not a whole one."""
    half = half_written(line)
    if half is not None:
        raise EmupmemError(
            f"memmap={half.text} on the kernel command line is not written to its end: "
            f"the kernel takes {human(half.size)} from {half.start:#x} on",
            "remove it or correct it (memmap=SIZE!START) in the boot configuration",
            state=UNCHANGED,
        )


def refuse_mangled(line: CommandLine) -> None:
    """Raise EmupmemError for an item that would make the kernel leave almost all memory unused."""
    item = mangled(line)
    if item:
        size = human(next(i.size for i in line.items if i.text == item))
        raise EmupmemError(
            f"memmap={item} on the kernel command line is a limit of {size} for all memory, as the kernel reads it",
            r"remove it or correct it (memmap=SIZE!START; a $ as \\\$) in the boot configuration",
        )


def read_own_dropin(machine: Host) -> tuple[str, tuple[str, ...]] | None:
    """(variable, words) of our drop-in, None where there is none. Raises EmupmemError for one that was edited."""
    data = machine.read(dropin.NAME)
    if data is None or not reads_dropins(machine):
        return None
    found = dropin.read_dropin(data.decode("utf-8", "replace"))
    if found is None:
        raise EmupmemError(f"{dropin.NAME} is not as emupmem wrote it", "remove it by hand, then try again")
    return found


def unread_dropin(machine: Host) -> tuple[FileEdit, ...]:
    """What takes our drop-in away where no grub-mkconfig reads it."""
    data = machine.read(dropin.NAME)
    if data is None or not data.startswith(dropin.MARK.encode()) or reads_dropins(machine):
        return ()
    return (FileEdit(dropin.NAME, data, None),)


def items_of_words(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(i for w in words for i in quoting.items_of(w))


def items_of_all(held: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(item for items in held.values() for item in items)


def reserved_twice(held: dict[str, tuple[str, ...]], hint: str) -> EmupmemError:
    places = " and ".join(f"memmap={','.join(items)} in {name}" for name, items in held.items())
    return EmupmemError(f"{GRUB_DEFAULT} reserves in two places: {places}", hint)


def words_to_take_out(machine: Host, before: bytes, after: bytes) -> tuple[str, ...]:
    """Words other than memmap= that an undo takes away: what apply had added beside it (nokaslr)."""
    old, new = (defaults.read_grub_file(t, GRUB_DEFAULT, sh=judge_of(machine)) for t in (before, after))
    gone = (set(old.variable(v).words) - set(new.variable(v).words) for v in editor_text.VARIABLES)
    return tuple(w for words in gone for w in sorted(words) if w in OUR_WORDS)


def undone_defaults(machine: Host, current: bytes) -> bytes:
    """The text without our items: former bytes from the backups of the applies that made it."""
    text = current
    for name in _records(machine):
        former, written = machine.read(name), machine.read(f"{name}.written")
        if former is None or written is None or not configured_items(machine, written):
            continue
        candidate = edits.undo_lines(text, former, written)
        if candidate is None:
            continue  # its lines are not in force: an apply that did not come to its end, or was changed since
        text = candidate
        if not configured_items(machine, text):
            return text
        # that apply replaced an earlier one of ours: go on with the one before it
    return defaults.remove_items(text, None, sh=judge_of(machine))


def _records(machine: Host) -> list[str]:
    """Backups of /etc/default/grub that an apply or remove of ours made, newest first."""
    names = [n for n in machine.names(BACKUPS) if n.startswith("grub.") and n.endswith(".written")]
    return [f"{BACKUPS}/{n.removesuffix('.written')}" for n in sorted(names, reverse=True)]


def refuse_dropin_items(machine: Host) -> None:
    """Raise EmupmemError for a drop-in of somebody else that reserves: two places that do are a trap."""
    for name, text in grub_texts(machine):
        if name in (GRUB_DEFAULT, dropin.NAME):
            continue
        for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
            code = line.split("#")[0]
            if "memmap=" in code and ("!" in code or RESERVATION.search(code)):
                raise EmupmemError(
                    f"{name}:{number} reserves memory already: {code.strip()}",
                    "remove that line first, or keep its reservation",
                )


def reads_dropins(machine: Host) -> bool:
    """Whether the machine's grub-mkconfig sources /etc/default/grub.d: Debian's family patches it so.

    By the program itself, else by /etc/os-release; where neither is there, it is taken to.
    """
    for name in GRUB_MKCONFIGS:
        program = _readable(machine, name)
        if program is not None:
            return b"default/grub.d" in program
    release = machine.peek(OS_RELEASE)
    return not release or bool({"debian", "ubuntu"} & set(families(machine)))


def _readable(machine: Host, name: str) -> bytes | None:
    try:
        return machine.read(name)
    except EmupmemError:
        return None


def grub_texts(machine: Host) -> list[tuple[str, bytes]]:
    """The files that grub-mkconfig sources, in its order: (name, content)."""
    dropins = machine.names(GRUB_DROPINS) if reads_dropins(machine) else []
    shown = [n for n in dropins if n.endswith(".cfg") and not n.startswith(".")]  # as *.cfg of sh
    names = [GRUB_DEFAULT, *(f"{GRUB_DROPINS}/{n}" for n in shown)]
    return [(n, data) for n in names if (data := _sourced(machine, n)) is not None]


def _sourced(machine: Host, name: str) -> bytes | None:
    """What sh reads of it: nothing of a drop-in that was masked by a link to /dev/null."""
    return b"" if machine.real(name) == "/dev/null" else machine.read(name)


def items_by_variable(
    machine: Host, unseen: list[tuple[str, str]]
) -> tuple[tuple[str, ...] | None, tuple[str, ...], str]:
    """Our items in GRUB's defaults, drop-ins included: of normal entries, of recovery entries, and where."""
    try:
        if machine.read(GRUB_DEFAULT) is None:
            raise EmupmemError(f"there is no {GRUB_DEFAULT}")
        values = defaults.effective(grub_texts(machine), sh=judge_of(machine))
    except EmupmemError as exc:
        unseen.append(("configured", exc.message))
        return None, (), editor_text.LINUX
    linux, default = values[editor_text.LINUX].items, values[editor_text.DEFAULT].items
    return (*linux, *default), linux, editor_text.DEFAULT if default and not linux else editor_text.LINUX


def judge_of(machine: Host) -> Judge:
    """The sh that reads GRUB's defaults: for the tree of another machine it sees no programs and no files."""
    if machine.replay is not None:
        return machine.replay
    return shell.judge(with_programs=machine.live)


def configured_items(machine: Host, data: bytes) -> dict[str, tuple[str, ...]]:
    """Our items in a text of /etc/default/grub, for each variable that has any."""
    found = defaults.read_grub_file(data, GRUB_DEFAULT, sh=judge_of(machine))
    return {v: found.variable(v).items for v in editor_text.VARIABLES if found.variable(v).items}
