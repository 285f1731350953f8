# SPDX-License-Identifier: Apache-2.0
"""The tests, in folders as the packages of emupmem; what they share is here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypothesis import settings

PROJECT = Path(__file__).resolve().parents[1]
FIXTURES = PROJECT / "tests" / "fixtures"


def examples(most: int) -> settings:
    """Settings for a property: this many examples, a quarter of them in the inner loop (`pytest --quick`)."""
    from hypothesis import settings
    from hypothesis.errors import InvalidArgument

    try:
        quick = settings().max_examples == settings.get_profile("quick").max_examples
    except InvalidArgument:  # fuzzing: pytest's profiles are not there
        quick = False
    return settings(max_examples=max(5, most // 4) if quick else most, deadline=None)
