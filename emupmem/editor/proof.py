# SPDX-License-Identifier: Apache-2.0
"""The proof of an edit: `sh` reads the old and the new text, and they differ in our words only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from emupmem.editor.edits import WantedWords
from emupmem.editor.lens import Layout, layout_of, line_of
from emupmem.editor.quoting import OddValueError, items_of, without_items, words_of
from emupmem.editor.shell import Judge, Sourced
from emupmem.editor.text import MARK, VARIABLES, printable
from emupmem.model import UNCHANGED, EmupmemError
from emupmem.record import record


@record
class Proof:
    """What `prove` found. `carried` names other variables that take our words over from ours."""

    by_lens: bool
    carried: tuple[str, ...] = ()


# --- the proof -------------------------------------------------------------------------------------------


@record
class EditCase:
    """What is to be proven of an edited text; `again` is the edit, which must change nothing more."""

    source: str
    before: Sourced
    wishes: Mapping[str, WantedWords]
    filename: str
    judge: Judge
    again: Callable[[str], str]


def first_proven(case: EditCase, edits: Sequence[Callable[[str], str]]) -> str:
    """Give the result of the first edit that can be proven; raise the reason of the first that cannot."""
    reason: EmupmemError | None = None
    for edit in edits:
        try:
            changed = edit(case.source)
            prove_case(case, changed)
        except OddValueError:
            continue
        except EmupmemError as exc:
            reason = reason or exc
        else:
            return changed
    line = max(line_of(name, case.source) for name in VARIABLES)
    raise reason or EmupmemError(
        f"{case.filename}:{line}: the quotes of this value are not understood",
        "write it as one quoted string",
    )


def prove_case(case: EditCase, changed: str) -> Proof:
    layout = layout_of(case.source)
    if layout.nodes is not None:
        _same_tree(layout, layout_of(changed), case.filename)
    before = case.before
    after = before if changed == case.source else case.judge([changed.encode("latin-1")])
    if after.failed:
        reason = printable("; ".join([after.failed, *(c[2] for c in after.complaints[-1:])]))
        raise EmupmemError(
            f"{case.filename}: sh could not read the edited file: {reason}", _BY_HAND, state=UNCHANGED
        )
    problem = _disagreement(case, after, before)
    if problem:  # what differs between two runs of the same text is not our doing
        again = case.judge([case.source.encode("latin-1")])
        problem = problem if again.failed else _disagreement(case, after, again)
    if problem:
        raise problem
    if case.again(changed) != changed:
        raise EmupmemError(
            f"{case.filename}: a second edit would change the file again", _BY_HAND, state=UNCHANGED
        )
    carried = tuple(n for n, old in before.rest.items() if _carries(old, after.rest.get(n), before, after))
    return Proof(layout.nodes is not None, carried)


_BY_HAND = "edit that line by hand, or put the argument into the other variable"


def _same_tree(before: Layout, after: Layout, filename: str) -> None:
    """Compare the two trees but for the values of our variables and our own comment."""

    def others(layout: Layout) -> list[tuple[str, str]]:
        return [
            (path, value)
            for path, value in layout.nodes or ()
            if path.rsplit("/", 1)[-1] not in VARIABLES and value != MARK.removeprefix("# ")
        ]

    if after.nodes is None:
        raise EmupmemError(
            f"{filename}:{after.error_line}: augeas could not read the edited file", _BY_HAND, state=UNCHANGED
        )
    if others(before) != others(after):
        raise EmupmemError(
            f"{filename}: augeas sees more changed than our arguments", _BY_HAND, state=UNCHANGED
        )


def _disagreement(case: EditCase, after: Sourced, again: Sourced) -> EmupmemError | None:
    """Say what sh reads differently than intended; `again` shows what is unstable by itself."""
    before = case.before
    for name, wish in case.wishes.items():
        old, new = before.values[-1][name], after.values[-1][name]
        problem = _wrong_items(new, wish) or _wrong_words(old, new, again.values[-1][name], wish)
        if problem:
            line = line_of(name, case.source) or layout_of(case.source).error_line
            place = f"{case.filename}:{line}" if line else case.filename
            return EmupmemError(
                f"{place}: after the edit sh would read {name} with {problem}", _BY_HAND, state=UNCHANGED
            )
    for name in sorted(before.rest.keys() | after.rest.keys()):
        was, now = before.rest.get(name), after.rest.get(name)
        if was != now and again.rest.get(name) == was and not _carries(was, now, before, after):
            return EmupmemError(
                f"{case.filename}: the edit would change {name} as well", _BY_HAND, state=UNCHANGED
            )
    return None


def _wrong_items(new: str | None, wish: WantedWords) -> str:
    items = items_of(new or "")
    if items == wish.items:
        return ""
    found = f"memmap={','.join(items)}" if items else "no memmap= of ours"
    wanted = f"memmap={','.join(wish.items)}" if wish.items else "none"
    return f"{found} instead of {wanted} (another assignment, command or variable decides)"


def _wrong_words(old: str | None, new: str | None, again: str | None, wish: WantedWords) -> str:
    if old is None and new is not None and not wish.items and not wish.extra:
        return "a value where it had none"
    if old is not None and new is None and (_others(old, wish.drop) or not items_of(old)):
        return "no value any more"  # fine where the value was ours alone: our own line is gone
    if left := [w for w in words_of(new or "") if w in wish.drop]:
        return f"{left[0]} still in it"
    was, repeat = ([*_others(v, wish.drop), *wish.extra] for v in (old, again))
    now = _others(new, wish.drop)
    if was == repeat and now != was:
        return f"the other words changed: {printable(' '.join(now))}"
    if len(was) == len(repeat) == len(now):
        unlike = [b for a, b, c in zip(was, now, repeat, strict=True) if a == c and a != b]
        if unlike:
            return f"the other words changed: {printable(' '.join(unlike))}"
    return ""


def _others(value: str | None, drop: Sequence[str]) -> list[str]:
    words = (without_items(w) for w in words_of(value or "") if w not in drop)
    return [w for w in words if w]


def _carries(old: str | None, new: str | None, before: Sourced, after: Sourced) -> bool:
    """Whether a variable differs only because it is made from one of ours (`RECOVERY="$… single"`)."""
    if old is None or new is None or old == new:
        return False
    for name in VARIABLES:
        was, now = before.values[-1][name] or "", after.values[-1][name] or ""
        if now and now != was and new.replace(now, was).replace("'", "") == old.replace("'", ""):
            return True
        if was and now != was and old.replace(was, now).replace("'", "") == new.replace("'", ""):
            return True
    return False
