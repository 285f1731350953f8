# SPDX-License-Identifier: Apache-2.0
"""A change of GRUB's defaults as data: what is written, and the generator that makes the menu of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot import entry as boot_entry
from emupmem.boot import foreign
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import dropin, environment, trial
from emupmem.boot.grub import menu as grub_menu
from emupmem.boot.grub.defaults import (
    effective_defaults,
    read_own_dropin,
    undone_defaults,
    unread_dropin,
    words_to_take_out,
)
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.boot.grub.length import refuse_too_long
from emupmem.boot.loader import Steps, Wanted
from emupmem.editor import defaults, quoting
from emupmem.editor import text as editor_text
from emupmem.model import UNCHANGED, Command, EmupmemError, FileEdit
from emupmem.system import backups
from emupmem.system.host import Host


def grub_files(machine: Host) -> tuple[str, ...]:
    """The files that a change may write."""
    own = (GRUB_DEFAULT, trial.SCRIPT, dropin.NAME)
    menus = dict.fromkeys((environment.grub_cfg(machine), *environment.GRUB_CFGS))
    return (*own, *menus, environment.grubenv_name(machine))


def given_back_steps(machine: Host, main: bytes, held: dict[str, tuple[str, ...]], wanted: Wanted) -> Steps:
    """All of it. Where nothing else changed the file since apply, the kept backup gives the former bytes."""
    after, sh = undone_defaults(machine, main) if held else main, grub_defaults.judge_of(machine)
    for variable in held if wanted.drop else ():
        after = defaults.set_items(after, variable, (), drop_words=wanted.drop, sh=sh)
    if after != main:
        gone = words_to_take_out(machine, main, after)
        variable = next(iter(held), editor_text.LINUX)
        defaults.prove(main, after, variable, (), drop_words=gone, sh=sh)
    return steps_to(machine, main, after, wanted, None)


def placed_steps(machine: Host, main: bytes, wanted: Wanted) -> Steps:
    """The items in /etc/default/grub, or where that is overridden, in a drop-in."""
    sh, variable = grub_defaults.judge_of(machine), wanted.variable
    words, drop = wanted.add, wanted.drop
    after = defaults.set_items(main, variable, wanted.items, words, drop, sh=sh)
    if after != main:
        defaults.prove(main, after, variable, wanted.items, extra_words=words, drop_words=drop, sh=sh)
    steps = steps_to(machine, main, after, wanted)
    meant = defaults.effective([(GRUB_DEFAULT, after)], sh=sh)[variable].items
    if effective_defaults(machine, after)[variable].items == meant:
        return steps
    if grub_defaults.configured_items(machine, main):
        last = effective_defaults(machine, after)[variable]
        raise EmupmemError(
            f"{last.filename}:{last.line} overrides {variable}, so what {GRUB_DEFAULT} says does not reach "
            "the kernel",
            "sudo emupmem remove removes the reservation there; apply then uses a drop-in of its own",
        )
    return dropin_steps(machine, main, wanted, wanted.add)


def dropin_steps(machine: Host, main: bytes, wanted: Wanted, extra: Sequence[str]) -> Steps:
    """The items in a drop-in of our own.

    Raises EmupmemError where another file still has the last word, or would be changed by it.
    """
    variable, was = wanted.variable, machine.read(dropin.NAME)
    last = effective_defaults(machine, main, None)[variable]
    words = (f"memmap={','.join(wanted.items)}", *extra)
    data = dropin.dropin_text(variable, words, f"{last.filename}:{last.line}").encode()
    seen = effective_defaults(machine, main, data)[variable]
    if quoting.words_of(seen.value or "") != (*quoting.words_of(last.value or ""), *words):
        raise EmupmemError(
            f"{seen.filename}:{seen.line} overrides {variable}, so neither {GRUB_DEFAULT} nor {dropin.NAME} "
            "would reach the kernel",
            "make that file extend the variable",
        )
    steps = steps_to(machine, main, main, wanted, data)
    note = f"{last.filename}:{last.line} overrides {variable}: the reservation goes into {dropin.NAME}"
    return replace(steps, notes=(note,) if was is None else ())


def steps_to(
    machine: Host, main: bytes, after: bytes, wanted: Wanted, own: bytes | bool | None = True
) -> Steps:
    """The steps to these defaults, `own` being our drop-in (True: as it is); the script of a trial goes."""
    values = effective_defaults(machine, after, own)
    recovery = values[editor_text.LINUX].items
    wanted = replace(wanted, items=(*recovery, *values[editor_text.DEFAULT].items), recovery=recovery)
    if wanted.items and not machine.live:
        refuse_too_long(machine, main, after, own)  # no generator runs that would show it
    script = machine.read(trial.SCRIPT)
    edits = [FileEdit(GRUB_DEFAULT, main, after)]
    edits += [FileEdit(trial.SCRIPT, script, None, 0o755)] if script is not None else []
    edits += unread_dropin(machine)
    if isinstance(own, bytes) or (own is None and read_own_dropin(machine) is not None):
        edits.append(FileEdit(dropin.NAME, machine.read(dropin.NAME), own or None))
    left = machine.live and (
        bool(menu_problems(machine, environment.grub_cfg(machine), wanted))
        or backups.has_leftovers(machine, grub_files(machine))
        or (script is None and bool(trial.problem(whole_menu(machine), ())))
    )
    return with_generator(machine, Steps(wanted, tuple(edits), unfinished=left))


def with_generator(machine: Host, steps: Steps) -> Steps:
    """The same with the generator, where anything is to be done and the machine is here to run it."""
    unchosen = machine.live and trial.chosen(machine) != bool(steps.wanted.trial)
    if not machine.live or not (steps.changed or steps.unfinished or unchosen):
        return replace(steps, recorded=(GRUB_DEFAULT,))
    cfg = environment.grub_cfg(machine)
    found = environment.generator(machine)
    if found is None:
        raise EmupmemError(
            "neither update-grub2, update-grub, grub2-mkconfig nor grub-mkconfig is installed: "
            "grub.cfg cannot be generated",
            state=UNCHANGED,
        )
    copies = machine.exists(foreign.PROXMOX_ESPS)
    return replace(
        steps,
        commands=(found,),
        # A generator may write another menu than the one that boots; that one is judged, and both are put back.
        menus=(cfg, *(n for n in environment.GRUB_CFGS if machine.real(n) != machine.real(cfg))),
        refresh=(Command(foreign.PROXMOX_REFRESH, "copy the menu"),) if copies else (),
        recorded=(GRUB_DEFAULT,),
        # In the language of the menu that is there, or every other line of it would change as well.
        language=grub_menu.language(whole_menu(machine), _system_language(machine)),
    )


def _system_language(machine: Host) -> str:
    """What the machine's settings say of LANG: of systemd's file, or Debian's."""
    for name in ("/etc/locale.conf", "/etc/default/locale"):
        found = re.search(r"""^LANG=["']?([^"'\s]+)["']?[ \t]*$""", machine.peek(name), re.MULTILINE)
        if found:
            return found[1]
    return ""


def menu_problems(machine: Host, cfg: str, wanted: Wanted) -> list[tuple[boot_entry.BootEntry | None, str]]:
    """What is wrong with the menu; nothing is known of one that is not ours to read."""
    try:
        text = machine.text(cfg)
    except EmupmemError:
        return []  # a dry run without root says nothing of it
    recovery = wanted.items if wanted.recovery is None else wanted.recovery
    wrong = boot_entry.problems(grub_menu.entries(text), wanted.items, recovery)
    return wrong or ([] if grub_menu.whole(text) else [(None, "it is not written to its end")])


def whole_menu(machine: Host) -> str:
    """The menu, its whole copy where it is torn, empty where it is not ours to read."""
    try:
        return trial.menu_or_copy(machine)
    except EmupmemError:
        return ""
