# SPDX-License-Identifier: Apache-2.0
"""What is waited for, for whoever shows it: nobody does, unless the command line asks to be told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

Watcher = Callable[[str, float | None], None]
"""Called about once a second with what is waited for and the seconds so far; with None when that is over."""

_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` what is waited for meanwhile."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[Callable[[], None]]:
    """While something takes its time: what it yields is to be called now and then."""
    began = time.monotonic()
    try:
        yield lambda: _tell(what, time.monotonic() - began)
    finally:
        _tell(what, None)


def _tell(what: str, seconds: float | None) -> None:
    for watcher in _watchers:
        watcher(what, seconds)
