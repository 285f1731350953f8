# SPDX-License-Identifier: Apache-2.0
"""GRUB with a menu that grub-mkconfig makes of /etc/default/grub: the loader of most machines.

grub-mkconfig writes the menu in place, so it is set aside before and put back first. A trial is one extra entry,
made by a script in /etc/grub.d and chosen in GRUB's environment block.
"""

from __future__ import annotations

from dataclasses import replace

from emupmem.boot.entry import BootEntry
from emupmem.boot.grub import checks, dropin, environment, trial
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import menu as grub_menu
from emupmem.boot.grub.defaults import (
    effective_defaults,
    effective_line,
    items_by_variable,
    items_of_all,
    items_of_words,
    read_defaults,
    read_own_dropin,
    refuse_dropin_items,
    reserved_twice,
)
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.boot.grub.steps import (
    dropin_steps,
    given_back_steps,
    grub_files,
    menu_problems,
    placed_steps,
    steps_to,
    whole_menu,
    with_generator,
)
from emupmem.boot.loader import (
    Check,
    Loader,
    NextStart,
    Options,
    Standing,
    Steps,
    Trial,
    Wanted,
    taken_choice,
)
from emupmem.editor import defaults, quoting
from emupmem.editor import text as editor_text
from emupmem.model import Command, CommandLine, EmupmemError, FileEdit
from emupmem.system.backups import BACKUPS, has_leftovers, is_aside
from emupmem.system.host import Host
from emupmem.system.machine import Machine


class Grub(Loader):
    """GRUB with a grub.cfg by grub-mkconfig."""

    title = "GRUB"
    back = "in GRUB's menu (hold Shift or press Esc at the start) press e, delete {memmap}, press Ctrl-x"
    by_hand = f"make room, restore {GRUB_DEFAULT} from {BACKUPS} and run {{run}}"

    # How it stands -------------------------------------------------------------------------------------------

    def standing(self, machine: Host) -> Standing:
        main = read_defaults(machine)
        held = grub_defaults.configured_items(machine, main)
        own = read_own_dropin(machine)
        places = tuple(held.items()) + (((dropin.NAME, items_of_words(own[1])),) if own is not None else ())
        variable = own[0] if own is not None else next(iter(held), editor_text.LINUX)
        cfg, script = whole_menu(machine), trial.read_script(machine.peek(trial.SCRIPT))
        entries = tuple(e for e in grub_menu.entries(cfg) if e.ids[-1:] != (trial.ID,))
        return Standing(
            tuple(i for _, items in places for i in items),
            variable,
            environment.grub_cfg(machine),
            entries,
            grub_menu.default_entry(cfg, _without_choice(machine)),
            script[1] if script is not None else (),
            machine.live and trial.chosen(machine),
            places=places,
            source=effective_line(machine, main),
        )

    def line(self, machine: Host) -> CommandLine:
        return effective_line(machine, read_defaults(machine))

    def next_start(self, machine: Host, unseen: list[tuple[str, str]]) -> NextStart:
        configured, recovery, variable = items_by_variable(machine, unseen)
        name = environment.grub_cfg(machine)
        cfg = _seen_text(machine, name, unseen)
        entries = tuple(grub_menu.entries(cfg)) if cfg is not None else None
        whole = cfg is None or grub_menu.whole(cfg)
        return NextStart(configured, recovery, variable, entries, name, (name,), whole)

    def target(self, machine: Host) -> BootEntry | None:
        cfg = checks.readable_menu(machine)
        found = grub_menu.default_entry(cfg, environment.grubenv(machine)) if cfg else None
        if found is None:
            found = next((e for e in grub_menu.entries(cfg) if e.ours and not e.recovery), None)
        return found

    def trial(self, machine: Host) -> Trial | None:
        found = trial.read_script(machine.peek(trial.SCRIPT))
        if found is None:
            return None
        variable, words = found
        return Trial(trial.SCRIPT, words, trial.chosen(machine), trial.is_in_menu(machine), variable)

    def seen(self, machine: Host, name: str) -> str:
        shown = name if "grub" in name.lower() else f"GRUB, which {name} started" if name else "GRUB"
        return f"{shown}, {environment.grub_cfg(machine)}"

    # Whether it may be changed -------------------------------------------------------------------------------

    def refuse(self, machine: Host) -> None:
        checks.refuse_no_grub(machine)

    def checks(self, machine: Host) -> dict[str, Check]:
        started: dict[str, Check] = {
            "loader": checks.refuse_other_loader,
            "menus": checks.refuse_two_menus,
            "copies": checks.warn_of_copies,
        }
        return {"grub": checks.refuse_no_grub, **(started if machine.running else {})}

    def refuse_apply(self, machine: Host, now: Standing, options: Options) -> None:
        held = {place: items for place, items in now.places if place != dropin.NAME}
        if len(held) > 1 and not options.replace:
            raise reserved_twice(held, "--replace puts the new one in place of both")
        if held and len(held) < len(now.places):
            raise EmupmemError(
                f"both {GRUB_DEFAULT} and {dropin.NAME} reserve memory", "sudo emupmem remove takes away both"
            )
        refuse_dropin_items(machine)

    def refuse_removal(self, machine: Host) -> None:
        refuse_dropin_items(machine)

    def refuse_trial(self, machine: Host) -> None:
        why, fix = trial.obstacle(machine)
        if why:
            again = "a trial that hangs would be started again and again; "
            raise EmupmemError(
                f"GRUB cannot clear its choice: {why}", again + (fix or "apply without --trial")
            )

    def refuse_kexec(self, machine: Host) -> None:
        return

    # What a change is ----------------------------------------------------------------------------------------

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        main, own = read_defaults(machine), read_own_dropin(machine)
        held = grub_defaults.configured_items(machine, main)
        if not wanted.items:
            return given_back_steps(machine, main, held, wanted)
        if own is not None:
            theirs = (*wanted.add, *wanted.drop)
            kept = [w for w in own[1] if not quoting.items_of(w) and w not in theirs]
            return dropin_steps(machine, main, wanted, (*kept, *wanted.add))
        named = [i for i in items_of_all(held) if i not in wanted.items]
        left = tuple(i for i in items_of_all(held) if i in wanted.items)
        fewer = bool(named) and left == wanted.items and tuple(held) == (wanted.variable,)
        if fewer and not wanted.add:
            sh = grub_defaults.judge_of(machine)
            variable, items, drop = wanted.variable, wanted.items, wanted.drop
            after = defaults.remove_items(main, named, sh=sh)
            after = defaults.set_items(after, variable, items, drop_words=drop, sh=sh) if drop else after
            defaults.prove(main, after, variable, items, drop_words=drop, sh=sh)
            return steps_to(machine, main, after, wanted)
        return placed_steps(machine, main, wanted)

    def settle(self, machine: Host, now: Standing) -> Steps:
        main = read_defaults(machine)
        steps = steps_to(machine, main, main, Wanted(variable=now.where))
        # The script of a trial goes, also where somebody edited it so that it cannot be read.
        gone = any(e.name == trial.SCRIPT for e in steps.changed)
        return replace(steps, unfinished=steps.unfinished or gone)

    def trial_steps(self, machine: Host, now: Standing, wanted: Wanted) -> Steps:
        text = trial.menu_or_copy(machine)
        variable = wanted.variable or editor_text.LINUX
        made = trial.script(text, environment.grubenv(machine), wanted.trial, variable, machine.exists)
        before, main = machine.read(trial.SCRIPT), read_defaults(machine)
        script = FileEdit(trial.SCRIPT, before, made.encode("utf-8", "surrogateescape"), 0o755)
        # Tried before and not chosen any more, or not to its end: the menu is made and the choice is taken again.
        again = (
            not now.chosen
            or bool(trial.problem(text, wanted.trial))
            or has_leftovers(machine, grub_files(machine))
        )
        other = "" if now.chosen else environment.grubenv(machine).get(trial.NEXT, "")
        edits = (FileEdit(GRUB_DEFAULT, main, main), script)
        steps = Steps(replace(wanted, recovery=()), edits, unfinished=again, notes=taken_choice(other))
        return with_generator(machine, steps)

    def files(self, machine: Host) -> tuple[str, ...]:
        return grub_files(machine)

    def to_run_there(self, machine: Host) -> Command | None:
        return environment.generator_of_tree(machine)

    def torn(self, machine: Host) -> tuple[str, ...]:
        cfg = environment.grub_cfg(machine)
        return (cfg,) if is_aside(machine, cfg) and not grub_menu.whole(machine.text(cfg)) else ()

    # While it is carried out ---------------------------------------------------------------------------------

    def chosen(self, machine: Host) -> bool:
        return trial.chosen(machine)

    def choose(self, machine: Machine, wanted: bool) -> None:
        environment.set_grubenv(machine, trial.NEXT, trial.ID if wanted else "")

    def choice(self, machine: Host) -> str:
        return environment.grubenv(machine).get(trial.NEXT, "")

    def choose_again(self, machine: Machine, name: str) -> None:
        environment.set_grubenv(machine, trial.NEXT, name)

    def prove(self, machine: Host, before: Standing, steps: Steps) -> int:
        if not machine.live:
            return 0  # the menu is made on that machine
        cfg, name = before.menu, self.done_by(steps)  # not one that a generator made elsewhere
        wrong = menu_problems(machine, cfg, steps.wanted)
        if wrong:
            entry, why = wrong[0]
            where = f"{cfg}:{entry.line} “{entry.title}”" if entry else cfg
            raise EmupmemError(f"{name} made a menu that is not as planned: {where}: {why}", _blame(machine))
        text = machine.text(cfg)
        if before.default is not None and grub_menu.default_entry(text, _without_choice(machine)) is None:
            raise EmupmemError(
                f"{name} made a menu without the entry that boots by default: “{before.default.title}”",
                "GRUB_DEFAULT names it by its title, which is another one now: give its id or its number there",
            )
        problem = trial.problem(text, steps.wanted.trial)
        if problem:
            raise EmupmemError(f"{name} made a menu that is not as planned: {cfg}: {problem}")
        return sum(1 for e in grub_menu.entries(text) if e.ours and e.command_line.reservations)

    def done_by(self, steps: Steps) -> str:
        return steps.commands[0].argv[0] if steps.commands else ""


def _seen_text(machine: Host, name: str, unseen: list[tuple[str, str]]) -> str | None:
    try:
        data = machine.read(name)
    except EmupmemError as exc:
        unseen.append(("generated", exc.message))
        return None
    if data is None:
        unseen.append(("generated", f"there is no {name}"))
        return None
    return data.decode("utf-8", "surrogateescape")


def _without_choice(machine: Host) -> dict[str, str]:
    """GRUB's environment block without a choice for one start."""
    return {k: v for k, v in environment.grubenv(machine).items() if k != trial.NEXT}


def _blame(machine: Host) -> str:
    """Which file had the last word on the variables, for the message; the new defaults are in place."""
    try:
        values = effective_defaults(machine, read_defaults(machine))
    except EmupmemError:
        return ""
    others = sorted(
        {f"{v.filename}:{v.line}" for v in values.values() if v.filename not in ("", GRUB_DEFAULT)}
    )
    return f"{', '.join(others)} has the last word on the command line" if others else ""
