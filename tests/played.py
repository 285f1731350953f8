# SPDX-License-Identifier: Apache-2.0
"""Stand-ins written in Python are played in a fork of this interpreter: it is warm, one that starts needs 25 ms.

A change of some loader starts ten programs, and the crash tests make thousands of changes. All else is as when a
program is started: a process and a session of its own, its own words, environment and streams, none of our files.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

HEAD = f"#!{sys.executable} -IS\n"
"""How a stand-in in Python begins: without `site`, which takes longer than the rest of its start."""

_FIRST = 3
"""The first descriptor that is no stream."""


class Popen(subprocess.Popen[bytes]):
    """As subprocess.Popen for what emupmem starts; a stand-in does not begin with an exec."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], **how: Any) -> None:
        code = _code(argv[0])
        if code is not None:
            keep = how.get("pass_fds", ())
            how |= {"preexec_fn": lambda: _play(code, argv, env, keep), "restore_signals": False}
        super().__init__(argv, env=env, **how)


class Subprocess:
    """The module `subprocess` with that Popen."""

    Popen = Popen

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def _code(file: str) -> CodeType | None:
    """The stand-in in a file; None where it is another program."""
    try:
        with Path(file).open("rb") as stream:
            if stream.read(len(HEAD)) != HEAD.encode():
                return None
            return _compiled(stream.read().decode(), file.rpartition("/")[2])
    except OSError:  # told of by who starts it
        return None


_EMUPMEM = compile("from emupmem.__main__ import start\nstart()", "emupmem", "exec")


def emupmem(*words: str) -> subprocess.CompletedProcess[str]:
    """`emupmem` with these words, in a process of its own."""
    argv = ["emupmem", *words]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: _play(_EMUPMEM, argv, dict(os.environ), ()),  # noqa: PLW1509
        restore_signals=False,
    ) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@cache
def _compiled(text: str, name: str) -> CodeType:
    return compile(f"\n{text}", name, "exec")


def _play(
    code: CodeType, argv: Sequence[str], environment: Mapping[str, str], keep: Collection[int]
) -> NoReturn:
    """Be the program, in the child: it ends here."""
    status = 1
    try:
        status = _ends(lambda: _begin(code, argv, environment, keep))
        sys.stdout.flush()
    finally:
        os._exit(status & 0xFF)


def _begin(
    code: CodeType, argv: Sequence[str], environment: Mapping[str, str], keep: Collection[int]
) -> None:
    gc.disable()  # it would touch, and so copy, all that the parent holds
    # One of these tells subprocess that the program runs.
    start = _FIRST
    for number in sorted(n for n in keep if n >= _FIRST):
        os.closerange(start, number)
        start = number + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(argv)
    streams = [io.FileIO(number, mode, closefd=False) for number, mode in enumerate(("r", "w", "w"))]
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(s, "utf-8", "surrogateescape") for s in streams)
    sys.stderr.reconfigure(errors="backslashreplace", write_through=True)
    exec(code, {"__name__": "__main__", "__file__": argv[0], "__builtins__": __builtins__})


def _ends(work: Callable[[], None]) -> int:
    """Do it; the status that Python would end with."""
    try:
        work()
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        print(exc.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
