# SPDX-License-Identifier: Apache-2.0
"""What a cage is made after: the way that confines sh, and what the child needs to know."""

from __future__ import annotations

import ctypes
from enum import Enum

from emupmem.record import record


class Way(Enum):
    """What confines sh. The first one that works is taken."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"


class CageError(Exception):
    """The cage could not be built; sh was not started."""


@record
class CagePlan:
    """What the child needs to know; nothing is looked up after the fork that can be known before."""

    way: Way | None
    programs: bool
    files: tuple[int, ...]
    needs: tuple[str, ...]
    limits: tuple[tuple[int, int], ...]
    seccomp: ctypes.Array[ctypes.c_char] | None
