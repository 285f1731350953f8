# SPDX-License-Identifier: Apache-2.0
"""What the readers of /sys, /proc and a kernel's own files need of a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Reader(Protocol):
    """The part of a machine that only looks; `Machine` has all of it."""

    @property
    def live(self) -> bool: ...
    def peek(self, name: str) -> str: ...
    def names(self, folder: str) -> list[str]: ...
    def exists(self, name: str) -> bool: ...


class FileReader(Reader, Protocol):
    """The same where files can be opened and links followed."""

    def path(self, name: str | Path) -> Path: ...
