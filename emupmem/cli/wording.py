# SPDX-License-Identifier: Apache-2.0
"""Usage errors in this program's own words: what was typed, and whose help shows more."""

from __future__ import annotations

import re
from collections.abc import Sequence

GROUPS = ("namespaces", "qemu", "nvdimm")
"""Commands that have commands of their own."""

_RULES = (
    (
        r"Input should be a valid integer, unable to parse string as an integer",
        "{value} is not a whole number",
    ),
    (r"Unable to parse input string as an integer, exceeded maximum size", "the number is too large"),
    (r"Input should be a valid number, unable to parse string as a number", "{value} is not a number"),
    (r"Input should be greater than or equal to (\S+)", r"it must be \1 or more"),
    (r"Input should be less than or equal to (\S+)", r"it must be \1 or less"),
    (r"Input should be a finite number", "{value} is not a number"),
    (r"Value error, ", ""),
    (r" Did you mean (--[\w-]+)\?$", r" (Possible options: \1)"),
    (r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", r"too many words: \1"),
)
_OPTION = re.compile(r"^Invalid value for '(--[a-z-]+)")


def empty_word(words: Sequence[str]) -> str:
    """What is empty of the words that were typed, up to `--`; empty where nothing is.

    A variable that is not set is the usual reason. Nowhere has an empty word a meaning of its own.
    """
    before = ""
    for word in words:
        if word == "--":
            break
        if not word:
            return f"the word after {before}" if before else "a word"
        if word.startswith("--") and word.endswith("=") and word.count("=") == 1:
            return f"the value of {word[:-1]}"
        before = word
    return ""


def in_own_words(message: str, words: Sequence[str]) -> str:
    """A message of the library that reads the options, without the library's words."""
    option = _OPTION.match(message)
    value = ascii(_value_of(option[1], words)) if option is not None else "it"
    message = re.sub(r"(?<=: )'(.*)' is not a valid (integer|float)(?: range)?\.$", _no_number, message)
    message = re.sub(
        r"(\S+) is not in the range (?:([\d.]+)<=)?x(?:>=([\d.]+))?(?:<=([\d.]+))?\.$", _outside, message
    )
    for theirs, ours in _RULES:
        message = re.sub(theirs, ours, message)
    return message.replace("{value}", value)


# What the click before typer's own parser says (typer up to 0.20, and Debian 13's).


def _no_number(found: re.Match[str]) -> str:
    if re.fullmatch(r"[+-]?\d+(?:…\d+)?", found[1]):
        return "the number is too large"
    return "{value} is not a whole number" if found[2] == "integer" else "{value} is not a number"


def _outside(found: re.Match[str]) -> str:
    least, most = found[2] or found[3], found[4]
    if least and not (most and float(found[1]) > float(most)):
        return f"it must be {least} or more"
    return f"it must be {most} or less"


def _value_of(option: str, words: Sequence[str]) -> str:
    """What was typed for an option, the last one where there are several."""
    given = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            given = following
        elif word.startswith(f"{option}="):
            given = word.partition("=")[2]
    return given[:40]


def help_hint(words: Sequence[str], commands: Sequence[str], message: str = "") -> str:
    """The second line of a usage error: the command whose help shows more."""
    typed = [w for w in words if not w.startswith("-")]
    names = typed[:1] if typed and typed[0] in commands else []
    inside = names and names[0] in GROUPS and len(typed) > 1 and "No such command" not in message
    if inside and words.index(typed[1]) == words.index(typed[0]) + 1:
        names.append(typed[1])
    return " ".join(["see emupmem", *names, "--help"])
