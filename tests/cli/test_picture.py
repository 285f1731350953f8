# SPDX-License-Identifier: Apache-2.0
"""The picture of the memory map: what is drawn where, that it is XML, and that README's is today's."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from emupmem.cli import picture
from emupmem.cli.render import legend_of
from emupmem.model import GIB, DeviceKind, FirmwareMap, Kind, Loss, MapEntry, Request
from emupmem.planner.plan import plan
from emupmem.planner.situation import Situation
from tests import FIXTURES, PROJECT
from tests.cli.runner import Run
from tests.fake import LOG

SVG = "{http://www.w3.org/2000/svg}"
MAP = FirmwareMap(
    (
        MapEntry(0, 3 * GIB, Kind.RAM),
        MapEntry(3 * GIB, 4 * GIB - 256, Kind.RESERVED),
        MapEntry(4 * GIB, 20 * GIB, Kind.RAM),
    )
)


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def texts(root: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


def test_what_is_planned_lies_where_it_will_be() -> None:
    made = plan(Situation(MAP), Request(8 * GIB))
    root = drawn(picture.svg(Situation(MAP), made, "Memory"))
    (planned, legend) = [r for r in root.iter(f"{SVG}rect") if "stripes" in (r.get("style") or "")]
    room = picture.WIDTH - 2 * picture.MARGIN
    assert float(planned.get("x") or 0) == pytest.approx(picture.MARGIN + room * 4 / 20)
    assert float(planned.get("width") or 0) == pytest.approx(room * 8 / 20)
    assert legend.get("width") == "14"
    assert {"0", "4G", "12G", "20G", "memmap=8G!4G", "firmware"} <= set(texts(root))


def test_what_is_lost_is_shown_and_what_is_too_small_is_not_told() -> None:
    situation = Situation(MAP, losses=(Loss(16 * GIB, 20 * GIB, "the kernel"),))
    root = drawn(picture.svg(situation, None, "Memory"))
    names = legend_of(None)
    assert names["lost"] in texts(root)
    assert names["planned"] not in texts(root)
    assert names["hole"] not in texts(root)


ALL = Situation(
    FirmwareMap((*MAP.entries, MapEntry(24 * GIB, 40 * GIB, Kind.RAM))),
    losses=(Loss(30 * GIB, 40 * GIB, "the kernel"),),
)
"""Every kind of place is in it."""


@pytest.mark.parametrize(
    ("kind", "rows"), [(None, 1), (DeviceKind.PMEM, 2), (DeviceKind.DEVDAX, 2), (DeviceKind.MEMORY, 2)]
)
def test_all_of_it_lies_in_the_picture(kind: DeviceKind | None, rows: int) -> None:
    made = None if kind is None else plan(ALL, Request(6 * GIB, count=2, kind=kind))
    root = drawn(picture.svg(ALL, made, "Memory"))
    right, bottom = picture.WIDTH - picture.MARGIN, float(root.get("height") or 0)
    shown = [(t, float(t.get("x") or 0), float(t.get("y") or 0)) for t in root.iter(f"{SVG}text")]
    for text, x, y in shown:
        assert y < bottom - 6, text.text
        letter = 7.23 if text.get("class") == "small" else 8.43
        assert text.get("text-anchor") != "start" or x + letter * len(text.text or "") <= right, text.text
    names = legend_of(made).values()
    places = {y for text, _, y in shown if text.text in names}
    assert len(places) == rows
    words = [y for text, _, y in shown if not text.get("class")]
    assert all(y > max(places) + 20 for y in words)
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("width") == "14"]
    assert {float(r.get("y") or 0) + 12 for r in boxes} == places


def test_it_says_what_the_plan_makes() -> None:
    made = plan(Situation(MAP), Request(8 * GIB, kind=DeviceKind.DAX))
    assert "planned: a DAX device, volatile" in texts(drawn(picture.svg(Situation(MAP), made, "Memory")))


def test_a_title_is_no_markup() -> None:
    text = picture.svg(Situation(MAP), None, '<script>&"\x1b')
    assert texts(drawn(text))[0] == '<script>&"\\x1b'


def test_suggest_writes_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    file = tmp_path / "map.svg"
    file.write_text("an older one")
    done = run("suggest", "--size", "1G", "--from", str(tmp_path / "log"), "--svg", str(file))
    assert done.status == 0
    assert f"✓ {file} written" in done.out
    assert "memmap=1G!4G" in texts(drawn(file.read_text()))
    assert run("suggest", "--from", str(tmp_path / "log"), "--svg", str(tmp_path)).status == 1


def test_the_readme_shows_what_is_written_today(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "suggest.svg"
    log = FIXTURES / "boot/6.1-bios/dmesg"
    assert run("suggest", "--size", "1G", "--from", str(log), "--svg", str(file)).status == 0
    assert file.read_text() == (PROJECT / ".github/suggest.svg").read_text(), "make picture"
    assert ".github/suggest.svg" in (PROJECT / "README.md").read_text()
