# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests: their order, what this machine lacks, what is said while guests boot.

Nothing here or in a test depends on the time of day, on chance or on the order of tests.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from emupmem.editor import shell
from tests.cli.runner import Run, runner
from tests.fake import FakeMachine, build, running
from tests.judge import Elsewhere
from tests.vm import preflight, progress

# The same examples in every run, and no limit of time: what is slow here is the machine.
CALM = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("calm", CALM)
# New examples every time: `pytest --hypothesis-profile=search`.
settings.register_profile("search", CALM, derandomize=False, max_examples=1000, print_blob=True)
# For the inner loop.
settings.register_profile("quick", CALM, max_examples=25)
settings.load_profile("calm")

shell.SH_SECONDS = 120.0
"""What a busy machine may take for a shell that a user's machine starts in milliseconds."""

COUNT = "EMUPMEM_BOOTS"
"""Names, for the workers, the file that counts the boots of this run and the time it began."""


elsewhere = Elsewhere()


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "the inner loop: no guests, no scenarios, nothing slow, fewer examples"
    parser.addoption("--quick", action="store_true", help=what)


MEMORY, ROOM, ROOM_FOR_GUESTS = Path("/dev/shm"), 2 << 30, 6 << 30
"""Where tests have their folders, and the bytes that must be free there: emupmem waits for the disk often.

What a guest writes goes to the disk (tests/vm/conftest.py), but two of them run beside all that.
"""
folders: list[str] = []


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    shell.ask_sh = elsewhere
    if config.option.quick:
        settings.load_profile("quick")
    if worker(config) or config.option.collectonly:
        return
    room = ROOM if config.option.quick else ROOM_FOR_GUESTS
    if not config.option.basetemp and _room_in_memory() > room:
        folders.append(tempfile.mkdtemp(prefix="emupmem-tests-", dir=MEMORY))
        config.option.basetemp = folders[0]
    count = Path(tempfile.mkdtemp(prefix="emupmem-tests-")) / "boots"
    os.environ[COUNT] = f"{time.time()} {count}"


def pytest_unconfigure(config: pytest.Config) -> None:
    elsewhere.close()
    if folders:
        subprocess.run(["rm", "-rf", *folders], check=False)
    if not worker(config) and (count := os.environ.pop(COUNT, "")):
        file = Path(count.partition(" ")[2])
        file.unlink(missing_ok=True)
        file.parent.rmdir()


def _room_in_memory() -> int:
    """Bytes that files in memory may take; none where they cannot have what files on a disk have."""
    try:
        with tempfile.NamedTemporaryFile(dir=MEMORY) as file:
            os.setxattr(file.name, "user.emupmem", b"kept")  # since Linux 6.6
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return min(shutil.disk_usage(MEMORY).free, int(available[1]) << 10 if available else 0)


def worker(config: pytest.Config) -> bool:
    """Whether this is a worker of xdist, which has no terminal of its own."""
    return hasattr(config, "workerinput")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What this machine lacks, a line each."""
    return preflight.lines()


# The order, and what cannot run -----------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What boots longest begins first, so that no worker is left with it at the end."""
    if config.option.quick:
        left = [i for i in items if any(i.get_closest_marker(m) for m in ("vm", "slow", "scenario"))]
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if i not in set(left)]
    items.sort(key=seconds, reverse=True)
    for item in items:
        mark = item.get_closest_marker("vm")
        if mark is not None and (why := preflight.no_guest(mark.kwargs["image"])):
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where guests boot, their lines go where this process' own words go, past what pytest captures.

    What was collected stays to the end: looking through it for garbage again and again was a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    total = sum(boots(item) for item in session.items)
    if total and COUNT in os.environ:
        began, _, count = os.environ[COUNT].partition(" ")
        progress.open_(_stderr(session.config), Path(count), total, float(began))


def _stderr(config: pytest.Config) -> int:
    """A copy of the standard error from before capturing; it is closed with the process."""
    manager = config.pluginmanager.getplugin("capturemanager")
    if manager is None:
        return os.dup(2)
    with manager.global_and_fixture_disabled():
        return os.dup(2)


def boots(item: pytest.Item) -> int:
    """How often a test boots a guest."""
    mark = item.get_closest_marker("vm")
    return 0 if mark is None else int(mark.kwargs["boots"])


def seconds(item: pytest.Item) -> int:
    """About how long a test takes on an idle machine, where it counts; the sort is stable."""
    mark = next((m for n in ("vm", "slow", "scenario") if (m := item.get_closest_marker(n))), None)
    return 0 if mark is None else int(mark.kwargs.get("seconds", 10))


# The program on a machine in a folder --------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The program as people call it."""
    return runner(capsys)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine in a folder that the program takes for the running one."""
    machine = build(tmp_path / "machine")
    running(monkeypatch.setattr, machine)
    return machine


# What is said meanwhile ---------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test with guests says when it begins and ends."""
    if not boots(item):
        return (yield)
    name, began = item.name.removeprefix("test_").partition("[")[0], time.monotonic()
    progress.begin(name, boots(item))
    progress.say(f"{name}: begins, {boots(item)} boots, about {seconds(item)} s on an idle machine")
    result = yield
    progress.say(f"{name}: over after {time.monotonic() - began:.0f} s · {progress.counted()}")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The number of boots that a test declares is the number that it makes."""
    result = yield
    if boots(item):
        assert progress.booted() == boots(item), f"vm(boots={boots(item)}) boots {progress.booted()} times"
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped, counted by reason."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
