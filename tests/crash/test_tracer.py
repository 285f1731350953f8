# SPDX-License-Identifier: Apache-2.0
"""The tracer itself: it sees every changing call, of the work and of what it starts, and lets none escape."""

from __future__ import annotations

import errno
import signal
import subprocess
from pathlib import Path

import pytest

from tests.crash import tracer
from tests.crash.tracer import Call, trace
from tests.crash.worlds import Disk

pytestmark = pytest.mark.skipif(not tracer.available(), reason="this machine lets nobody trace (x86-64 only)")

SCRIPT = "echo hi > c; mv c d; mkdir e; ln -s d f; chmod 600 d; rm d; rmdir e; touch f/../g 2>/dev/null; true"


def test_every_changing_call_is_seen(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
        subprocess.run(["sh", "-c", SCRIPT], cwd=tmp_path, check=True)

    seen: list[tuple[str, bool]] = []

    def on_call(call: Call) -> None:
        if call.inside(tmp_path):
            seen.append((call.name, call.own))

    assert trace(work, on_call).status == 0
    assert seen[:3] == [("open", True), ("write", True), ("rename", True)]
    others = [name for name, own in seen if not own]
    for wanted in ("open", "write", "rename", "mkdir", "symlink", "fchmodat", "unlink", "rmdir"):
        assert any(name.startswith(wanted) for name in others), wanted


def test_a_call_can_be_let_fail_and_then_has_not_happened(tmp_path: Path) -> None:
    def work() -> None:
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "a").write_text("x")

    def on_call(call: Call) -> None:
        if call.name == "write" and call.inside(tmp_path):
            call.fail(errno.ENOSPC)

    assert trace(work, on_call).status == 0
    assert (tmp_path / "a").read_text() == ""


def test_killed_before_a_call_it_has_not_happened(tmp_path: Path) -> None:
    def on_call(call: Call) -> None:
        if call.name == "rename":
            call.trace.kill()

    def work() -> None:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")

    assert trace(work, on_call).status == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_disk_forgets_what_was_not_synced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    disk = Disk(tmp_path)
    worlds: list[dict[str, bytes]] = []

    def on_call(call: Call) -> None:
        disk.about_to(call)

    def work() -> None:
        (tmp_path / "b").write_text("new")
        (tmp_path / "b").rename(tmp_path / "a")

    assert trace(work, on_call).status == 0
    worlds = [{n: node.data for n, node in world.items() if n} for _, world in disk.worlds()]
    disk.close()
    assert worlds == [{"a": b"new"}, {"a": b"old"}, {"a": b""}]
