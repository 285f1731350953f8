"""Trial boots: `apply --trial`, `confirm`, `abandon`. No logic of its own."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

from emupmem.cli.change import carry_out, change_result
from emupmem.cli.options import DryRun, Json, Yes
from emupmem.cli.output import Exit, ask, finish, json_errors, root_machine, say
from emupmem.cli.stdio import changing
from emupmem.model import EmupmemError, Request

if TYPE_CHECKING:
    from emupmem.boot.change import Options
    from emupmem.planner.survey import Survey
    from emupmem.system.machine import Machine


_BACK = "If it hangs or panics, or is not wanted any more: any reset, the old configuration is back."


def begin(
    machine: Machine,
    found: Survey,
    request: Request,
    options: Options,
    how: str,
    result: dict[str, Any],
    warnings: list[str] | tuple[str, ...],
    dry_run: bool,
    check: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """What `apply --trial` does; ends the command with its exit status."""
    from emupmem.boot import prepare

    prepared = prepare.prepare_trial(machine, found, request, options, entry=how == "grub")
    told = [*warnings, *prepared.warnings]
    if how == "grub":
        carry_out(machine, prepared, result, told, dry_run, check, yes, as_json)
    _kexec(
        machine,
        prepared.plan.memmap if prepared.plan else "",
        options,
        result,
        told,
        dry_run,
        check,
        yes,
        as_json,
    )


def _kexec(
    machine: Machine,
    memmap: str,
    options: Options,
    result: dict[str, Any],
    warnings: list[str],
    dry_run: bool,
    check: bool,
    yes: bool,
    as_json: bool,
) -> None:
    from emupmem.boot import trial

    if not (dry_run or check):
        changing()
    words = (memmap, *(("nokaslr",) if options.nokaslr else ()))
    steps = trial.kexec(machine, words, options.variable)
    result |= {"memmap": memmap, "commands": [list(step.argv) for step in steps]}
    for warning in warnings:
        say(f"! {warning}")
    if not as_json:
        for step in steps:
            print(f"then: {shlex.join(step.argv)}")
        print(_BACK)
    if dry_run or check:
        finish(as_json, result, Exit.NOT_AS_PLANNED if check else Exit.OK)
    if not yes:
        ask("This restarts the machine now. Go on?")
    sys.stdout.flush()
    for step in steps:
        done = machine.run(step, 120)
        if done.status:
            machine.output(*trial.UNLOAD.argv)
            raise EmupmemError(f"{step.argv[0]} failed with status {done.status}: {done.last_words}")
    result |= {"changed": True}
    if not as_json:
        print(
            "The machine restarts into the trial. After it:  sudo emupmem verify, then sudo emupmem confirm\n"
            f"{_BACK}"
        )
    finish(as_json, result, Exit.OK)


def confirm(dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Make the reservation of the trial that is running permanent, if all of it is as planned."""
    from emupmem.boot import prepare, trial
    from emupmem.verifier import ladder, observe

    result = change_result()
    with json_errors(as_json, result):
        machine = root_machine("this changes the boot configuration")
        prepared = prepare.prepare_confirm(machine)
        # Where a confirm that was killed is brought to its end there is no trial any more to judge.
        verdict = ladder.verify(observe.observe(machine, 10)) if trial.state(machine) else None
        if verdict is not None and not verdict.ok:
            broken = next(c for c in verdict.checks if c.status in ("fail", "pending"))
            raise EmupmemError(
                f"the trial is not good: {broken.name}: {broken.found}",
                f"{broken.hint}; sudo emupmem abandon takes the trial away",
            )
        carry_out(machine, prepared, result, list(prepared.warnings), dry_run, False, yes, as_json)


def abandon(dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Take the entry of a trial away; nothing else changes."""
    from emupmem.boot import prepare

    result = change_result()
    with json_errors(as_json, result):
        machine = root_machine("this changes the boot configuration")
        prepared = prepare.prepare_abandon(machine)
        carry_out(machine, prepared, result, list(prepared.warnings), dry_run, False, yes, as_json)
