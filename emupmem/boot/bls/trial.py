# SPDX-License-Identifier: Apache-2.0
"""The entry of a trial as a file of the Boot Loader Specification: the default one with words added. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.boot.bls import text as bls_text

MARK = "# emupmem-trial:"

SORT_KEY = "zz-emupmem-trial"
"""Sorted after all distributions: the first entry boots by default (Boot Loader Specification, Sorting)."""


def trial_entry(text: str, words: Sequence[str]) -> str:
    """The trial's entry, made of the `text` of the one that boots by default."""
    items = [i for w in words if w.startswith("memmap=") for i in w.removeprefix("memmap=").split(",")]
    extra = [w for w in words if not w.startswith("memmap=")]
    after = bls_text.rework_entry(text, items, extra)
    bls_text.prove_words(bls_text.options(text), bls_text.options(after), items, extra)
    kept = [x for x in after.split("\n") if not re.match(r"\s*(#|title\s|sort-key\s)", x)]
    return "\n".join([*_head(words), *kept])


def trial_entry_of(words: Sequence[str], start: str, line: str) -> str:
    """The trial's entry where there is none to make it of: `start` is the line that names what it starts."""
    return "\n".join([*_head(words), start, f"options {line}", ""])


def _head(words: Sequence[str]) -> list[str]:
    return [f"{MARK} {' '.join(words)}", f"title Trial of emupmem: {' '.join(words)}", f"sort-key {SORT_KEY}"]


def trial_words(text: str) -> tuple[str, ...]:
    """The words that a trial's entry adds, none for another text."""
    found = re.search(rf"^{re.escape(MARK)} (memmap=\S+(?: \S+)*)$", text, re.MULTILINE)
    return tuple(found[1].split(" ")) if found is not None else ()
