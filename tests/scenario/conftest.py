"""The fixture of scenarios, and what is said where they cannot be played."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.scenario.machine import Host, Play, Scenario, lacking


@pytest.fixture
def play() -> Iterator[Play]:
    """Start scenarios that end with the test; skipped, with the reason, where none can be played."""
    if why := lacking():
        pytest.skip(f"scenario: {why}")
    with ExitStack() as stack:

        def start(host: Host) -> Scenario:
            return stack.enter_context(Scenario(host))

        yield start
