# SPDX-License-Identifier: Apache-2.0
"""sh as the judge of the tests, started by a small process of its own, and asked once of a text without any `$`.

The cage is built between fork and exec, and the fork of a process that holds all tests costs ten times what sh
does. It is the same `ask_sh`; only what it inherits is less. Tests of just that ask `here`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence

from emupmem.editor import shell
from emupmem.editor.shell import Sourced
from tests import PROJECT

SH = shell.SH
here = shell.ask_sh
"""The judge in this process."""


class Elsewhere:
    """`ask_sh` by a process that is started at the first call and ends with this one."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        self.answers: dict[object, object] = {}

    def __call__(self, texts: Sequence[bytes], path: str = shell.SH_PATH) -> Sourced:
        if os.getpid() != self.owner:  # a fork, which may be another user
            return here(texts, path)
        question = (tuple(texts), path, shell.SH, shell.SH_SECONDS)
        with self.lock:
            answer = self.answers.get(question) or self._answer(question)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Sourced)
        if shell.SH == SH and not any(sign in text for text in texts for sign in (b"$", b"`")):
            self.answers[question] = answer
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process is not None and os.getpid() == self.owner:
            self.process.communicate()
            self.process = None

    def _answer(self, question: object) -> object:
        if self.process is None:
            argv = [sys.executable, "-m", "tests.judge"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(argv, cwd=PROJECT, stdin=pipe, stdout=pipe)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


def serve() -> None:
    """Answer until nobody asks."""
    asked, said = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            texts, path, shell.SH, shell.SH_SECONDS = pickle.load(asked)
        except EOFError:
            return
        try:
            answer: object = here(texts, path)
        except Exception as exc:
            answer = exc
        pickle.dump(answer, said)
        said.flush()


if __name__ == "__main__":
    serve()
