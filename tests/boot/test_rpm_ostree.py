# SPDX-License-Identifier: Apache-2.0
"""Trials on rpm-ostree: a deployment of its own, the one before it pinned (the stand-in is in test_loader.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import kernelstub, prepare, trial
from emupmem.boot.change import Change
from emupmem.boot.loader import Options
from emupmem.boot.transaction import carry_out_change
from emupmem.model import GIB, Check, EmupmemError, Request
from emupmem.verifier import ladder, observe
from tests import fake
from tests.boot.test_loader import ROOT, RPM_OSTREE, apply, ostree, program, remove, survey_of
from tests.cli.runner import Run
from tests.fake import FakeMachine, put, script

pytestmark = pytest.mark.slow  # the inner loop has each loader in test_loader.py

MARK = "emupmem.trial=pinned"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = ostree(tmp_path)
    program(made, "ostree", RPM_OSTREE, HEAD="")
    return made


def begin(machine: FakeMachine, **options: bool) -> tuple[str, ...]:
    prepared = prepare.prepare_trial(machine, survey_of(machine), Request(GIB), Options(**options))  # type: ignore[arg-type]
    if prepared.needed:
        carry_out_change(machine, prepared)
    return prepared.warnings


def kargs(machine: FakeMachine) -> list[str]:
    return sorted(machine.peek("/kargs").split())


def pins(machine: FakeMachine) -> str:
    return machine.peek("/pins")


def starts(machine: FakeMachine) -> None:
    """The trial is booted: what ran before it is the rollback deployment now."""
    put(machine, "/proc/cmdline", machine.peek("/kargs"))
    put(machine, "/pins", pins(machine).replace("booted", "rollback"))


def test_a_trial_pins_what_runs_and_says_that_nothing_is_forgotten(machine: FakeMachine) -> None:
    before = kargs(machine)
    said = begin(machine, nokaslr=True)
    assert kargs(machine) == sorted([*before, "memmap=1G!4G", "nokaslr", f"{MARK},nokaslr"])
    assert pins(machine) == "booted"
    assert any("until you choose the deployment before it in the boot menu" in w for w in said)
    seen = trial.state(machine)
    assert seen is not None
    assert (seen.words, seen.chosen, seen.running) == (("memmap=1G!4G", "nokaslr"), True, False)
    verdict = ladder.verdict_of(observe.observe(machine, 0))
    assert {c.name: c.status for c in verdict.checks}["trial"] == "pending"
    made = kargs(machine)
    begin(machine, nokaslr=True)
    assert kargs(machine) == made
    carry_out_change(machine, prepare.prepare_abandon(machine))
    assert kargs(machine) == before
    assert pins(machine) == ""
    with pytest.raises(EmupmemError, match="there is no trial to abandon"):
        prepare.prepare_abandon(machine)


def test_a_trial_that_runs_is_confirmed_or_abandoned(machine: FakeMachine) -> None:
    before = kargs(machine)
    begin(machine)
    starts(machine)
    carry_out_change(machine, prepare.prepare_confirm(machine))
    assert kargs(machine) == sorted([*before, "memmap=1G!4G"])
    assert pins(machine) == ""
    remove(machine)
    assert kargs(machine) == before
    begin(machine)
    starts(machine)
    carry_out_change(machine, prepare.prepare_abandon(machine))
    assert kargs(machine) == before
    assert pins(machine) == ""


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("end", [prepare.prepare_confirm, prepare.prepare_abandon])
def test_a_word_of_a_person_stays(
    machine: FakeMachine, when: str, end: Callable[[FakeMachine], Change]
) -> None:
    """A trial does not bring what is there already, and does not take away what it has not brought."""
    if when == "before":
        put(machine, "/kargs", f"{machine.peek('/kargs').strip()} nokaslr\n")
    begin(machine, nokaslr=when == "before")
    if when == "during":
        put(machine, "/kargs", f"{machine.peek('/kargs').strip()} nokaslr\n")
    seen = trial.state(machine)
    assert seen is not None
    assert seen.words == ("memmap=1G!4G",)
    assert kargs(machine).count("nokaslr") == 1
    starts(machine)
    carry_out_change(machine, end(machine))
    assert kargs(machine).count("nokaslr") == 1
    assert [w for w in kargs(machine) if "emupmem" in w] == []
    remove(machine)
    assert kargs(machine).count("nokaslr") == 1


def test_remove_takes_a_trial_away(machine: FakeMachine) -> None:
    before = kargs(machine)
    begin(machine)
    remove(machine)
    assert kargs(machine) == before


def test_what_somebody_had_pinned_stays_pinned(machine: FakeMachine) -> None:
    put(machine, "/pins", "booted")
    begin(machine)
    assert "emupmem.trial=kept" in kargs(machine)
    carry_out_change(machine, prepare.prepare_abandon(machine))
    assert pins(machine) == "booted"


def test_a_failing_rpm_ostree_is_taken_back(machine: FakeMachine) -> None:
    before = kargs(machine)
    fails = 'if os.path.exists(ROOT + "/fail")'
    assert fails in RPM_OSTREE
    text = RPM_OSTREE.replace(fails, f"{fails} and any('append' in a for a in sys.argv)")
    program(machine, "rpm-ostree", text, HEAD="")
    put(machine, "/fail", "")
    with pytest.raises(EmupmemError, match="while staging") as caught:
        begin(machine)
    assert "the old configuration is back" in caught.value.hint
    assert kargs(machine) == before
    assert pins(machine) == ""


def test_where_something_is_reserved_a_trial_is_refused(machine: FakeMachine) -> None:
    apply(machine)
    with pytest.raises(EmupmemError, match="is reserved already"):
        begin(machine)


def test_the_commands_say_so(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    fake.running(monkeypatch.setattr, machine)
    done = run("apply", "--size", "1G", "--yes", "--trial")
    assert done.status == 0, done
    assert "the next deployment carries memmap=1G!4G; the one before it stays in the boot menu" in done.out
    assert "the old configuration is back" not in done.out
    assert "in the boot menu choose the deployment before this one" in done.out + done.err
    assert run("abandon", "--yes").status == 0


def test_suggest_asks_it_once(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    script(machine, "rpm-ostree", f'#!/bin/sh\necho "$@" >> {machine.root}/asked\necho {ROOT}\n')
    fake.running(monkeypatch.setattr, machine)
    for times in (1, 2):
        done = run("suggest", "--size", "1G")
        assert done.status == 0, done
        assert machine.peek("/asked").splitlines() == ["kargs"] * times


BUSY = 'sys.exit("error: Transaction in progress: upgrade")\n'


def fails_at(machine: FakeMachine, option: str) -> None:
    """Let rpm-ostree do nothing where it is called with this option."""
    begin_ = "words = read(file).split()\n"
    assert begin_ in RPM_OSTREE
    busy = f"if any(a.startswith({option!r}) for a in sys.argv):\n    {BUSY}"
    program(machine, "rpm-ostree", RPM_OSTREE.replace(begin_, begin_ + busy), HEAD="")


@pytest.mark.parametrize(
    ("booted", "end"),
    [
        (False, prepare.prepare_abandon),
        (False, prepare.prepare_remove),
        (True, prepare.prepare_abandon),
        (True, prepare.prepare_confirm),
        (True, prepare.prepare_remove),
    ],
)
def test_where_it_fails_the_deployment_before_stays_pinned(
    machine: FakeMachine, booted: bool, end: Callable[[FakeMachine], Change]
) -> None:
    """An update that is at work hinders rpm-ostree, and would drop what is not pinned."""
    begin(machine)
    if booted:
        starts(machine)
    before, kept = kargs(machine), pins(machine)
    fails_at(machine, "--delete")
    with pytest.raises(EmupmemError, match="Transaction in progress") as caught:
        carry_out_change(machine, end(machine))
    assert caught.value.hint == "the old configuration is back, nothing is changed"
    assert (kargs(machine), pins(machine)) == (before, kept)
    assert kept


def test_what_cannot_be_read_is_not_said_to_be_back(machine: FakeMachine) -> None:
    reads = "if len(sys.argv) == 2:\n"
    assert reads in RPM_OSTREE
    late = f'{reads}    if "1G!4G" in read(file):\n        sys.exit("error: Timeout was reached")\n'
    program(machine, "rpm-ostree", RPM_OSTREE.replace(reads, late), HEAD="")
    with pytest.raises(EmupmemError, match="Timeout was reached") as caught:
        apply(machine)
    assert "memmap=1G!4G" in kargs(machine)
    assert "not all could be put back: rpm-ostree kargs failed with status 1" in caught.value.hint
    assert "Before you reboot: look at rpm-ostree kargs" in caught.value.hint
    assert caught.value.changed


def test_what_is_not_undone_is_not_said_to_be_back(machine: FakeMachine) -> None:
    begin_ = "words = read(file).split()\n"
    text = RPM_OSTREE.replace(
        begin_, f'{begin_}if any("--delete" in a for a in sys.argv):\n    sys.exit()\n'
    ).replace('if os.path.exists(ROOT + "/fail")', "if True")
    program(machine, "rpm-ostree", text, HEAD="")
    with pytest.raises(EmupmemError, match="while staging") as caught:
        apply(machine)
    assert "memmap=1G!4G" in kargs(machine)
    hint = "not all could be put back: rpm-ostree kargs --delete=memmap=1G!4G is still to be done"
    assert hint in caught.value.hint


def test_a_mark_that_stands_twice_goes_twice(machine: FakeMachine) -> None:
    before = kargs(machine)
    begin(machine)
    put(machine, "/kargs", f"{machine.peek('/kargs').strip()} {MARK}\n")
    carry_out_change(machine, prepare.prepare_abandon(machine))
    assert (kargs(machine), pins(machine)) == (before, "")


def test_kernelstub_may_print_many_blank_lines() -> None:
    """A pattern that crosses lines took the square of their number."""
    assert kernelstub._SHOWN.search("\n" * 300_000 + "x Kernel Boot Options:...quiet") is None


def test_a_trial_that_did_not_come_is_over_and_would_come_again(machine: FakeMachine) -> None:
    """The person chose the deployment before it in the menu: "reboot" would lead into the hang once more."""

    def judged() -> Check:
        return next(c for c in ladder.verdict_of(observe.observe(machine, 0)).checks if c.name == "trial")

    put(machine, "/proc/sys/kernel/random/boot_id", "11112222-3333-4444-5555-666677778888\n")
    begin(machine)
    assert f"{MARK},boot.11112222" in kargs(machine)
    assert (judged().status, judged().hint) == ("pending", "reboot")
    put(machine, "/proc/sys/kernel/random/boot_id", "99992222-3333-4444-5555-666677778888\n")
    put(machine, "/run/ostree/staged-deployment", "")  # an update has made another of it
    seen = trial.state(machine)
    assert seen is not None
    assert (seen.stage, seen.chosen, seen.again) == ("over", True, True)
    assert judged().status == "fail"
    assert judged().found.startswith("the machine came back without memmap=1G!4G: ")
    assert judged().hint.startswith("the next start tries it once more: sudo emupmem abandon first")
    starts(machine)
    assert "the next start is this trial as well, until it is confirmed or abandoned" in judged().found


@pytest.mark.parametrize("what", ["apply", "abandon"])
def test_pins_that_are_not_told_are_not_taken_away(machine: FakeMachine, what: str) -> None:
    """Its daemon is busy once: what was pinned is not known, and that is not "nothing"."""
    if what == "abandon":
        begin(machine)
    put(machine, "/pins", "booted")
    before = kargs(machine)
    status = 'if sys.argv[1] == "status":\n'
    assert status in RPM_OSTREE
    once = f'{status}    if not os.path.exists(ROOT + "/asked"):\n        write(ROOT + "/asked", "")\n        {BUSY}'
    text = RPM_OSTREE.replace(status, once)
    program(machine, "rpm-ostree", text, HEAD="")
    with pytest.raises(EmupmemError, match="does not tell which deployments are pinned") as caught:
        apply(machine) if what == "apply" else carry_out_change(machine, prepare.prepare_abandon(machine))
    assert "when its daemon answers" in caught.value.hint
    assert (kargs(machine), pins(machine)) == (before, "booted")
