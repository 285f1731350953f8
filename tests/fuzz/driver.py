# SPDX-License-Identifier: Apache-2.0
"""Runs targets under atheris (libFuzzer), keeps what they find, and runs single inputs again."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests import FIXTURES, PROJECT
from tests.fuzz import work

ROOT = PROJECT
CORPUS = FIXTURES / "fuzz"
WORK = ROOT / ".fuzz"
FINDINGS = WORK / "findings"
PACKAGE = str(ROOT / "emupmem") + os.sep

FOUND = ("crash", "oom", "timeout", "leak")
"""How libFuzzer names the inputs that are findings; it also writes down the slow ones, which are none."""

UNITS = 400.0
"""Work for one input, about four seconds of an idle machine; most take less than one unit."""
PAUSE = 300
"""Seconds after which an input that does not even use the processor counts as a hang."""
MEMORY = 3000


@dataclass(frozen=True, slots=True)
class Report:
    """What one target did. `finding` is the input that failed, `said` the last words about it."""

    target: str
    executions: int
    edges: int
    inputs: int
    cpu: float
    seconds: float
    finding: Path | None = None
    said: str = ""

    def __str__(self) -> str:
        return (
            f"{self.target:<10} {self.executions:>8} inputs run, {self.edges:>5} edges, {self.inputs:>4} kept, "
            f"{self.cpu:>5.0f} s of {self.seconds:>4.0f} s"
        )


def is_finding(name: str) -> bool:
    """Whether a file that libFuzzer wrote, TARGET-KIND-HASH, is an input that failed."""
    return name.partition("-")[2].startswith(FOUND)


def name_of(target: str, data: bytes) -> str:
    return f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"


def kept(target: str) -> list[Path]:
    """The inputs in the repository, of one target."""
    return sorted(CORPUS.glob(f"{target}-*"))


def replay(target: str, data: bytes) -> None:
    """Run one input within its limit of work; raises what the target raises."""
    from tests.fuzz.targets import TARGETS

    work.within(UNITS, lambda: TARGETS[target].run(data))


def run(targets: Sequence[str], seconds: float) -> Iterator[Report]:
    """Fuzz one target after the other, all within that time. Stops at the first finding of each."""
    for name in targets:
        yield _run_one(name, seconds / len(targets))


def _run_one(name: str, seconds: float) -> Report:
    from tests.fuzz.targets import TARGETS

    target, folder = TARGETS[name], WORK / name
    for made in (folder, FINDINGS):
        made.mkdir(parents=True, exist_ok=True)
    for data in (*target.seeds(), *(f.read_bytes() for f in kept(name))):
        (folder / name_of(name, data)).write_bytes(data)
    before = set(FINDINGS.iterdir())
    began, used = time.monotonic(), _children()
    argv = [sys.executable, "-m", "tests.fuzz", "--child", name, "--minutes", f"{seconds / 60}"]
    log = WORK / f"{name}.log"
    with log.open("wb") as out:
        done = subprocess.run(argv, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False)
    said = log.read_text("utf-8", "replace")
    fresh = sorted(f for f in set(FINDINGS.iterdir()) - before if is_finding(f.name))
    runs = [int(n) for n in re.findall(r"^#(\d+)\s", said, re.M)]
    runs += [int(n) for n in re.findall(r"number_of_executed_units: (\d+)", said)]
    edges = [int(n) for n in re.findall(r" cov: (\d+)", said)]
    finding = fresh[0] if fresh else (log if done.returncode else None)
    return Report(
        name,
        max(runs, default=0),
        max(edges, default=0),
        sum(1 for _ in folder.iterdir()),
        _children() - used,
        time.monotonic() - began,
        finding,
        "" if finding is None else _last_words(said),
    )


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _last_words(said: str) -> str:
    """The Python exception, or what libFuzzer says of a time-out or too much memory."""
    at = said.find("=== Uncaught Python exception: ===")
    text = said[at:] if at >= 0 else "\n".join(x for x in said.splitlines() if "ERROR" in x)
    return text.partition("\n==")[0][:3000].strip()


def child(name: str, seconds: int) -> None:
    """In a process of its own: fuzz one target until the time is over. Does not return."""
    import atheris  # type: ignore[import-untyped,unused-ignore]

    with atheris.instrument_imports(include=["emupmem"]):
        import emupmem.planner.survey  # noqa: F401
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.mutate import Mutator

    # A text that copies itself or forks without end must not take the machine along.
    resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY << 20, 2 * MEMORY << 20))
    target = TARGETS[name]
    mutate = Mutator(target.tokens, target.seeds())
    work.unit()

    def one(data: bytes) -> None:
        work.within(UNITS, lambda: target.run(data))

    def change(data: bytes, most: int, seed: int) -> bytes:
        if seed % 8 == 0:
            return bytes(atheris.Mutate(data, most))
        return mutate(data, most, seed)

    argv = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-timeout={PAUSE}",
        f"-rss_limit_mb={MEMORY}",
        f"-max_len={target.longest}",
        "-len_control=0",
        "-print_final_stats=1",
        f"-artifact_prefix={FINDINGS}/{name}-",
        str(WORK / name),
    ]
    atheris.Setup(argv, one, custom_mutator=change)
    atheris.Fuzz()


# The corpus ------------------------------------------------------------------------------------------


def reduce(name: str, most: int = 60, longest: int = 2048) -> tuple[int, int]:
    """Keep what is kept, and of all that was found the short inputs that reach more: (files, arcs of lines)."""
    seen: set[Any] = set()
    count = 0
    for file in kept(name):
        seen |= arcs(name, file.read_bytes())
        count += 1
    found = {f.read_bytes() for f in (WORK / name).glob("*") if f.is_file()}
    for data in sorted((d for d in found if len(d) <= longest), key=lambda d: (len(d), d)):
        if count >= most:
            break
        try:
            reached = arcs(name, data)
        except Exception as exc:
            print(f"left out, it fails: {name_of(name, data)}: {exc!r}"[:200], file=sys.stderr)
            continue
        if not reached <= seen:
            seen |= reached
            count += 1
            (CORPUS / name_of(name, data)).write_bytes(data)
    return count, len(seen)


def arcs(name: str, data: bytes) -> set[tuple[CodeType, int, int]]:
    """Pairs of lines of emupmem that were run one after the other."""
    reached: set[tuple[CodeType, int, int]] = set()
    last: dict[FrameType, int] = {}

    def local(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            reached.add((frame.f_code, last.get(frame, 0), frame.f_lineno))
            last[frame] = frame.f_lineno
        elif event == "return":
            last.pop(frame, None)
        return local

    def entered(frame: FrameType, event: str, arg: object) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    from tests.fuzz.targets import TARGETS

    former = sys.gettrace()
    sys.settrace(entered)
    try:
        TARGETS[name].run(data)
    finally:
        sys.settrace(former)
    return reached
