"""The order of the tests: what boots most begins first, so that no worker is left with it at the end."""

from __future__ import annotations

import pytest

BOOTS = 3
"""What a test in a virtual machine counts that does not say how often it boots: `pytest.mark.vm(boots=…)`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=boots, reverse=True)


def boots(item: pytest.Item) -> int:
    """How often a test boots a guest (a slow one counts 1); the sort is stable: all else stays as it is."""
    said: list[int] = [mark.kwargs.get("boots", BOOTS) for mark in item.iter_markers("vm")]
    return said[0] if said else int(item.get_closest_marker("slow") is not None)
