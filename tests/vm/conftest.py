# SPDX-License-Identifier: Apache-2.0
"""Folders for guests: on the disk, where the others have theirs in memory if there is room (see tests/conftest.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """What lies in memory is not kept, and emupmem says so of a file for a guest."""
    if request.node.get_closest_marker("vm") is None:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="emupmem-tests-") as folder:
        yield Path(folder)
