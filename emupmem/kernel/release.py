# SPDX-License-Identifier: Apache-2.0
"""A kernel's version."""

from __future__ import annotations

import re


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 12) of `6.12.5-amd64`; an unknown kernel counts as new."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (99, 0)
