# SPDX-License-Identifier: Apache-2.0
"""The memory map and the plan as a picture: a plain SVG that can be read on light and on dark pages.

Nothing in it is told by a colour alone: what is planned has its words beside it, the rest has a legend and a texture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from emupmem.cli.render import legend_of, what_is_left
from emupmem.model import LOW_LIMIT, Kind, Plan
from emupmem.planner.places import gone
from emupmem.units import plain, tight

if TYPE_CHECKING:
    from emupmem.planner.situation import Situation

WIDTH, MARGIN, TOP, HEIGHT = 820, 24, 84, 46
"""In pixels: the picture and its margin; where the bar begins, and how high it is."""

ROW, LETTERS = 22, 90
"""From one line of text to the next, in pixels; how many letters there is room for in one."""

SMALLEST = 400
"""What is less than this part of the whole is drawn, but cannot be seen: nothing tells of it."""

STYLE = """
text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328 }
.small { font-size: 12px } .head { font-weight: bold }
.page { fill: #ffffff; stroke: #d0d7de } .frame, .hole { fill: none; stroke: #59636e } .tick { stroke: #59636e }
.usable { fill: #9fd8ae } .firmware { fill: #f0c36d } .lost { fill: #ff8f88 } .planned { fill: #b05ad6 }
.stripe { stroke: #ffffff; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.page { fill: #0d1117; stroke: #30363d } .frame, .hole { stroke: #9198a1 } .tick { stroke: #9198a1 }
.usable { fill: #2c6b3f } .firmware { fill: #9a6b12 } .lost { fill: #b3362f } .planned { fill: #c678ea }
.stripe { stroke: #0d1117 }
}
"""


def svg(situation: Situation, plan: Plan | None, title: str) -> str:
    """The picture: the map up to the end of RAM in proportion, and below it what the plan means."""
    return "\n".join(_lines(situation, plan, title)) + "\n"


def _lines(situation: Situation, plan: Plan | None, title: str) -> Iterator[str]:
    end = max((s.end for s in situation.firmware.ram), default=1)
    spans = list(_spans(situation, plan, end))
    large = [s for s in spans if s[2] - s[1] >= end // SMALLEST]
    words, names = list(_words(plan)), legend_of(plan)
    rows = _legend({kind: name for kind, name in names.items() if any(kind == s[0] for s in large)})
    told_at = TOP + HEIGHT + 86 + ROW * max(len(rows) - 1, 0)
    lines = [line for sentence in words for line in _fitting(sentence)]
    height = told_at + 6 + ROW * len(lines)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-labelledby="title what">'
    )
    told = "; ".join(f"{names[kind]} {tight(first)} to {tight(last)}" for kind, first, last in large)
    yield f'<title id="title">{_escaped(title)}</title>'
    yield f'<desc id="what">{_escaped(". ".join([told, *words]))}</desc>'
    yield f"<style>{STYLE}</style>"
    yield (
        '<defs><pattern id="stripes" width="8" height="8" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="planned" width="8" height="8"/>'
        '<line class="stripe" x1="0" y1="0" x2="0" y2="8"/></pattern></defs>'
    )
    yield f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
    yield _text(MARGIN, 36, title, "head")
    for kind, first, last in (s for s in spans if s[0] != "hole"):
        yield _box(kind, _x(first, end), TOP, max(_x(last, end) - _x(first, end), 1), HEIGHT)
    yield f'<rect class="frame" x="{MARGIN}" y="{TOP}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT}"/>'
    yield from _scale(plan, end)
    for number, row in enumerate(rows):
        yield from _legend_row(row, TOP + HEIGHT + 26 + ROW * number)
    for number, line in enumerate(lines):
        yield _text(MARGIN, told_at + ROW * number, line, "")
    yield "</svg>"


def _spans(situation: Situation, plan: Plan | None, end: int) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of all that is drawn, what lies on top last."""
    at = 0
    for entry in sorted(situation.firmware.entries, key=lambda e: e.start):
        if at < entry.start < end:
            yield "hole", at, entry.start
        at = max(at, entry.end)
        if entry.start < end:
            yield ("usable" if entry.kind is Kind.RAM else "firmware"), entry.start, min(entry.end, end)
    for first, last in gone(situation):
        if first < end:
            yield "lost", first, min(last, end)
    for one in plan.reservations if plan else ():
        yield "planned", one.start, one.start + one.size


def _words(plan: Plan | None) -> Iterator[str]:
    if plan is not None:
        yield plan.memmap
        yield what_is_left(plan)


def _fitting(sentence: str) -> list[str]:
    return wrap(sentence, LETTERS, break_long_words=False, break_on_hyphens=False)


def _x(address: int, end: int) -> float:
    return round(MARGIN + (WIDTH - 2 * MARGIN) * address / end, 2)


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    fill = ' class="frame" style="fill: url(#stripes)"' if kind == "planned" else f' class="{kind}"'
    return f'<rect{fill} x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{_escaped(text)}</text>'


def _scale(plan: Plan | None, end: int) -> Iterator[str]:
    """The addresses above the bar, from the most important on: one that would touch another is left out."""
    marks = {0: "0", end: tight(end)}
    for one in plan.reservations if plan else ():
        marks |= {one.start: tight(one.start), one.start + one.size: tight(one.start + one.size)}
    if end > LOW_LIMIT:
        marks.setdefault(LOW_LIMIT, "4G")
    taken: list[float] = []
    for address, name in marks.items():
        x = _x(address, end)
        if all(abs(x - other) > 42 for other in taken):
            taken.append(x)
            anchor = "start" if address == 0 else "end" if address == end else "middle"
            yield f'<line class="tick" x1="{x:g}" y1="{TOP - 6}" x2="{x:g}" y2="{TOP}"/>'
            yield _text(x, TOP - 12, name, "small", anchor)


def _legend(names: Mapping[str, str]) -> list[list[tuple[str, str]]]:
    """(kind, name) of all that is drawn, in as many rows as have room for them."""
    rows: list[list[tuple[str, str]]] = []
    x = float(WIDTH)
    for kind, name in names.items():
        if x + _entry_width(name) > WIDTH - MARGIN:
            rows.append([])
            x = MARGIN
        rows[-1].append((kind, name))
        x += _entry_width(name) + 28
    return rows


def _entry_width(name: str) -> float:
    return 22 + 7.4 * len(name)


def _legend_row(row: Sequence[tuple[str, str]], y: float) -> Iterator[str]:
    x = float(MARGIN)
    for kind, name in row:
        yield _box(kind, x, y, 14, 14)
        yield _text(x + 22, y + 12, name, "small")
        x += _entry_width(name) + 28


def _escaped(text: str) -> str:
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
