# SPDX-License-Identifier: Apache-2.0
"""What fuzzing found stays found: every input of tests/fixtures/fuzz again, and fixed mutations of the seeds.

The same inputs in every run: `make fuzz` looks for new ones, `python -m tests.fuzz --help` says how to run one again.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emupmem.editor import defaults
from emupmem.editor import text as editor_text
from emupmem.model import EmupmemError
from tests import PROJECT
from tests.fuzz import answers, driver, shell, targets, work
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_were_found(target: str) -> None:
    files = driver.kept(target)
    assert files, "no corpus: python -m tests.fuzz --keep"
    for file in files:
        data = file.read_bytes()
        assert file.name == driver.name_of(target, data), "named by its content"
        try:
            driver.replay(target, data)
        except BaseException as exc:
            exc.add_note(f"again: {sys.executable} -m tests.fuzz --replay {file}")
            raise


FEW, MANY = 12, 600
"""Mutations of each target: in the inner loop, and in all tests."""


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        *(pytest.param(name, range(FEW), id=name) for name in TARGETS),
        *(
            pytest.param(name, range(FEW, MANY), id=f"{name}-more", marks=pytest.mark.slow(seconds=10))
            for name in TARGETS
        ),
    ],
)
def test_seeds_and_what_mutation_makes_of_them(target: str, numbers: range) -> None:
    one = TARGETS[target]
    seeds = one.seeds()
    assert seeds
    mutate = Mutator(one.tokens, seeds)
    for number in numbers:
        data = seeds[number * 7 % len(seeds)]
        made = mutate(data, one.longest, number)
        assert len(made) <= one.longest
        assert made == mutate(data, one.longest, number), "the same number makes the same input"
        try:
            driver.replay(target, made)
        except BaseException as exc:
            exc.add_note(f"mutation {number} of {target}: {made!r}"[:2000])
            raise
    for data in seeds if numbers.start else ():
        driver.replay(target, data)


@pytest.mark.slow(seconds=5)
def test_every_target_begins_without_pytest() -> None:
    code = "from tests.fuzz.targets import TARGETS; print(*(len(t.seeds()) for t in TARGETS.values()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(int(n) for n in done.stdout.split())


def test_no_corpus_of_a_target_that_is_gone() -> None:
    assert {f.name.partition("-")[0] for f in driver.CORPUS.iterdir()} <= set(TARGETS)
    assert all(f.stat().st_size <= 10240 for f in driver.CORPUS.iterdir())


# The judges can fail ---------------------------------------------------------------------------------


def test_too_much_work_is_found() -> None:
    with pytest.raises(work.TooMuchWorkError), work.limited(5):
        while True:
            pass
    with work.limited(5):
        time.sleep(0.2)  # time that is not work


def test_what_the_machine_does_meanwhile_is_no_work_of_an_input() -> None:
    calls = 0

    def slow_once() -> None:
        nonlocal calls
        calls += 1
        while calls == 1:
            pass

    work.within(5, slow_once)
    assert calls == 2


def test_a_slow_input_is_no_finding() -> None:
    kinds = {"crash": True, "oom": True, "timeout": True, "leak": True, "slow-unit": False}
    assert {kind: driver.is_finding(f"cmdline-{kind}-0123abcd") for kind in kinds} == kinds


WRONG = {
    "another variable": lambda t: t.replace(b"TIMEOUT=5", b"TIMEOUT=6"),
    "another word": lambda t: t.replace(b"quiet", b"quite"),
    "another item": lambda t: t.replace(b"1G!4G", b"1G!8G"),
    "a lost line": lambda t: t.replace(b"GRUB_TIMEOUT=5\n", b""),
    "the other variable": lambda t: t.replace(b"quiet", b"quiet memmap=1G!4G"),
    "not read": lambda t: t + b"(\n",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_dash_finds_a_wrong_edit(wrong: str) -> None:
    text = b'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX=""\n'
    after = defaults.set_items(text, editor_text.LINUX, ["1G!4G"], sh=shell.judge)
    wish = targets._wish(["set", editor_text.LINUX, "1G!4G"])
    targets._check_edit(text, after, wish)
    with pytest.raises(AssertionError):
        targets._check_edit(text, WRONG[wrong](after), wish)


def test_dash_reads_what_set_prints() -> None:
    found = shell.sourced(b"A=\"it's\"\nB='a\nb=c'\n", b'C="$A"\nD=\n')
    assert found is not None
    assert {k: found[k] for k in "ABCD"} == {"A": "it's", "B": "a\nb=c", "C": "it's", "D": ""}
    assert shell.sourced(b"exit\n") is None
    assert shell.sourced(b"(\n") is None


def test_an_answer_of_two_lines_is_a_finding() -> None:
    exc = EmupmemError("well")
    answers.refused(exc)
    exc.message = "one line\nand one that it does not say"
    with pytest.raises(AssertionError):
        answers.refused(exc)


def test_a_pipe_gives_what_it_has() -> None:
    assert io.BufferedReader(targets._Drops(b"abcdef", 2)).read() == b"abcdef"


# The driver --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_input_is_run_again_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "cmdline-crash-0"
    file.write_bytes(b"memmap=1G!4G")
    argv = [sys.executable, "-m", "tests.fuzz", "--replay", str(file)]
    done = subprocess.run(argv, cwd=driver.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{file}: well\n"), done.stderr
