# SPDX-License-Identifier: Apache-2.0
"""Trial boots: `apply --trial`, `confirm`, `abandon`. No logic of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from emupmem.boot import prepare, trial
from emupmem.boot.change import Change
from emupmem.boot.loader import Options
from emupmem.cli.change import ask_and_carry_out, change_result
from emupmem.cli.options import DryRun, Json, Yes
from emupmem.cli.output import Exit, say, tell
from emupmem.cli.session import Session
from emupmem.model import EmupmemError

_BACK = "If it hangs or panics, or is not wanted any more: any reset, the old configuration is back."


def begin(
    session: Session, prepared: Change, options: Options, how: str, warnings: Sequence[str]
) -> NoReturn:
    """What `apply --trial` does; ends the command with its exit status."""
    told = [*warnings, *prepared.warnings]
    if how == "grub":
        ask_and_carry_out(session, prepared, told)
    _kexec(session, prepared.trial, options, told)


def _kexec(session: Session, words: Sequence[str], options: Options, warnings: Sequence[str]) -> NoReturn:
    session.changing()
    steps = trial.kexec(session.machine, tuple(words), options.variable)
    session.result |= {
        "memmap": words[0],
        "would_change": True,
        "commands": [list(step.argv) for step in steps],
    }
    for warning in warnings:
        say(f"! {warning}")
    if not session.as_json:
        for step in steps:
            tell(f"then: {shlex.join(step.argv)}")
        tell(_BACK)
    if session.only_shows:
        session.finish(Exit.NOT_AS_PLANNED if session.check else Exit.OK)
    session.confirm("This restarts the machine now. Go on?")
    sys.stdout.flush()
    for step in steps:
        done = session.machine.run(step, 120)
        if done.status:
            session.machine.output(*trial.UNLOAD.argv)
            raise EmupmemError(f"{step.argv[0]} failed with status {done.status}: {done.last_words}")
    session.result |= {"changed": True}
    if not session.as_json:
        tell(
            "The machine restarts into the trial. After it:  sudo emupmem verify, then sudo emupmem confirm\n"
            f"{_BACK}"
        )
    session.finish(Exit.OK)


def confirm(dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Make the running trial's reservation permanent, if every check passes."""
    from emupmem.verifier import ladder, observe  # 10 ms, apply imports us

    session = Session(change_result() | {"trial": ""}, as_json, dry_run=dry_run, yes=yes)
    with session.errors():
        session.be_root("this changes the boot configuration")
        tried = _told_trial(session)
        prepared = prepare.prepare_confirm(session.machine)
        # Where a confirm that was killed is brought to its end there is no trial any more to judge.
        verdict = ladder.verdict_of(observe.observe(session.machine, 10)) if tried else None
        if verdict is not None and not verdict.ok:
            broken = next(c for c in verdict.checks if c.status in ("fail", "pending"))
            raise EmupmemError(
                f"the trial is not good: {broken.name}: {broken.found}",
                f"{broken.hint}; sudo emupmem abandon takes the trial away",
            )
        ask_and_carry_out(session, prepared, prepared.warnings)


def _told_trial(session: Session) -> trial.State | None:
    """The trial, whose stage is in the result: an error of the command says whether there was one at all."""
    found = trial.state(session.machine)
    session.result["trial"] = found.stage if found is not None else "none"
    return found


def abandon(dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Cancel a trial: delete its boot entry, change nothing else."""
    session = Session(change_result() | {"trial": ""}, as_json, dry_run=dry_run, yes=yes)
    with session.errors():
        session.be_root("this changes the boot configuration")
        _told_trial(session)
        prepared = prepare.prepare_abandon(session.machine)
        ask_and_carry_out(session, prepared, prepared.warnings)
