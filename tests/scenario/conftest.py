# SPDX-License-Identifier: Apache-2.0
"""The fixture that plays scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.scenario.machine import Play, Scenario, lacking


@pytest.fixture
def play() -> Iterator[Play]:
    """Start scenarios that end with the test; skipped, with the reason, where none can be played."""
    if why := lacking():
        pytest.skip(f"no scenarios: {why}")
    with ExitStack() as stack:
        yield lambda host: stack.enter_context(Scenario(host))
