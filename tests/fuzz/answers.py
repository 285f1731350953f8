# SPDX-License-Identifier: Apache-2.0
"""What all targets share: the judge of an answer, and how an input is read."""

from __future__ import annotations

import unicodedata

from emupmem.model import EmupmemError
from emupmem.units import plain


def refused(exc: EmupmemError) -> None:
    """Judge the answer itself: one line each, which a terminal survives as it is printed; nobody's fault of ours."""
    assert exc.message
    assert "internal error" not in exc.message, exc.message
    for text in (exc.message, exc.hint):
        assert "\n" not in text, f"more than one line: {text!r}"
        odd = [c for c in plain(text) if unicodedata.category(c) in ("Cc", "Cs") and c != "\t"]
        assert not odd, f"{odd[:5]} in a message: {text!r}"


def headed(data: bytes) -> tuple[list[str], bytes]:
    """The words of the first line, which say what to do, and the text behind it."""
    head, _, body = data.partition(b"\n")
    return head.decode("utf-8", "replace").split(), body
