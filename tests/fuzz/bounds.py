# SPDX-License-Identifier: Apache-2.0
"""Targets that hold the bounds: what a size may be, what a plan must keep, how much is read of a file."""

from __future__ import annotations

import io
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from emupmem.kernel import cmdline, e820
from emupmem.model import (
    LOW_LIMIT,
    MIB,
    EmupmemError,
    FirmwareMap,
    Kind,
    Loss,
    MapEntry,
    NodeRange,
    Request,
    Reservation,
    Span,
)
from emupmem.nvdimm import ipmctl
from emupmem.parser import bootlog
from emupmem.planner import kernel_map, plan, survey
from emupmem.planner.situation import NoPlan, Situation
from emupmem.system import pipe, streams
from emupmem.system import plain as system_plain
from emupmem.system.machine import Machine
from emupmem.units import human, parse_size, tight
from emupmem.vm import options
from tests.fuzz.answers import headed, refused

# Sizes -----------------------------------------------------------------------------------------------

_MOST = 1 << 52
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_NAMED = re.compile(r"\b(?:0x[0-9a-f]+|\d+)[KMGT]?\b")


def _meant(text: str) -> Fraction | None:
    """What a person means by a size, by a reader of our own: None for what is no size."""
    word = text.strip().lower()
    if re.fullmatch(r"0x[0-9a-f]{1,60}", word):
        return Fraction(int(word, 16))
    found = re.fullmatch(r"([0-9]*\.?[0-9]*)\s*(?:([kmgt])(?:ib?)?|b|)", word)
    if found is None or not found[1].strip("."):
        return None
    return Fraction(found[1].strip() if found[1][-1] != "." else found[1][:-1]) * _BYTES[found[2] or ""]


def sizes(data: bytes) -> None:
    """A size as people, the kernel, QEMU and ipmctl write it: read exactly, or refused with sizes that would do."""
    text = data.decode("utf-8", "surrogateescape")
    _kernel_reads(text)
    found = options.qemu_size(text)
    assert found is None or 0 <= found < 1 << 64
    found = ipmctl.size(text)
    assert found is None or found >= 0
    try:
        size = parse_size(text)
    except EmupmemError as exc:
        refused(exc)
        assert len(exc.message) < 500
        meant = _meant(text)
        assert meant is None or meant > _MOST or meant.denominator != 1 or len(text.strip()) > 40, text
        if "nearest" in exc.hint:
            near = [parse_size(word) for word in _NAMED.findall(exc.hint)]
            assert meant is not None
            assert near[0] <= meant <= near[1]
        return
    assert size == _meant(text)
    assert 0 <= size <= _MOST
    assert parse_size(tight(size)) == parse_size(str(size)) == parse_size(hex(size)) == size
    assert len(human(size)) < 24
    if size:
        assert cmdline.memparse(cmdline.format_size(size)) == (size, "")
    _values(size)


def _kernel_reads(text: str) -> None:
    """memparse against a reader of our own: a number of any length, cut to 64 bits."""
    value, rest = cmdline.memparse(text)
    found = re.match(r"0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*)|()", text, re.ASCII)
    assert found is not None
    base = 16 if found[1] else 8 if found[2] else 10
    mine, left = 0, text[found.end() :]  # no digits: a letter of a unit is passed over all the same
    for digit in found[1] or found[2] or found[3] or "":
        mine = mine * base + int(digit, 16)
    shift = 10 * ("kmgtpe".find(left[0].lower()) + 1) if left and left[0].isascii() else 0
    assert (value, rest) == ((mine << shift) % (1 << 64), left[1:] if shift else left)


def _values(size: int) -> None:
    """What is advised in the place of a size or an address is taken."""
    makes: tuple[Callable[[int], Request], ...] = (Request, lambda n: Request(offset=n))
    for make in makes:
        try:
            plan.check_values(make(size))
        except EmupmemError as exc:
            refused(exc)
            for word in _NAMED.findall(exc.hint.partition(",")[0]):
                if word[-1] in "KMGT" and parse_size(word) <= _MOST:
                    plan.check_values(make(parse_size(word)))


_SIZES = """1G 1Gi 1GiB 0.5G 0.1G 1.5T 16g 4096 0x40000000 010G 1GB 1kb -1 +1G 1e9 nan 1. .5G 2M 3M 1P
1_000 0x1_0 ١G 4503599627370496 4503599627370497 4194304G 18446744073709551616 0.0009765625K 0.00000000001T 
33.75GiB 1,024 64b 0b1 0o7 1E1 2047M 0X20"""
SIZES = [*_SIZES.split(), "1 G", " 1G ", "126.4 GiB"]


# Plans -----------------------------------------------------------------------------------------------


@dataclass
class _Given:
    """A situation and a request, as an input writes them."""

    entries: list[MapEntry] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    nodes: list[NodeRange] = field(default_factory=list)
    allowed: list[Span] = field(default_factory=list)


_KINDS = {"usable": Kind.RAM, "reserved": Kind.RESERVED, "acpi": Kind.ACPI_DATA, "soft": Kind.SOFT_RESERVED,
          "pmem": Kind.PMEM, "pram": Kind.PRAM, "bad": Kind.UNUSABLE, "lost": None, "node0": None, "node1": None,
          "ram": None}  # fmt: skip
_ROW = re.compile(r"([0-9A-Fa-fxKMGT]{1,20})-([0-9A-Fa-fxKMGT]{1,20}) (\w+)")


def _given(text: str) -> _Given:
    found = _Given()
    for low, high, kind in _ROW.findall(text):
        start, end = cmdline.memparse(low)[0], cmdline.memparse(high)[0]
        if start >= end or end > _MOST or kind not in _KINDS:
            continue
        if kind == "lost":
            found.losses.append(Loss(start, end, "it says so"))
        elif kind.startswith("node"):
            if not any(n.start < end and start < n.end for n in found.nodes):
                found.nodes.append(NodeRange(int(kind[4:]), start, end))
        elif kind == "ram":
            found.allowed.append(Span(start, end))
        elif not any(e.start < end and start < e.end for e in found.entries):
            made = _KINDS[kind]
            assert made is not None
            found.entries.append(MapEntry(start, end, made, made.value))
    found.entries.sort(key=lambda e: e.start)
    return found


def _asked(words: Sequence[str]) -> tuple[Request, str]:
    """The request, and the rest of the words, which are the kernel's."""
    values: dict[str, int | None] = {}
    rest = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in ("size", "count", "offset", "min_free", "numa_node") and len(value) < 20:
            values[name] = cmdline.memparse(value)[0] % (1 << 53)
        else:
            rest.append(word)
    values["count"] = min(values.get("count") or 1, 5)
    return Request(**values), " ".join(rest)  # type: ignore[arg-type]


def plans(data: bytes) -> None:
    """A map, a command line and a request: what is planned is what the kernel makes of it, and keeps every rule."""
    words, body = headed(data)
    given = _given(body.decode("utf-8", "replace"))
    request, text = _asked(words)
    line = survey.without_reservations(cmdline.parse_command_line(text), ["1G!30G"])
    there = Situation(
        FirmwareMap(tuple(given.entries)),
        (("another map", tuple(given.allowed)),) if given.allowed else (),
        tuple(given.nodes),
        line if text else None,
        losses=tuple(given.losses),
    )
    try:
        made = plan.plan(there, request)
    except NoPlan as exc:
        refused(exc)
        _check_largest(there, request, exc)
        return
    except EmupmemError as exc:
        refused(exc)
        return
    assert made == plan.plan(there, request)
    assert len(made.reservations) == request.count
    assert request.size in (None, made.reservations[0].size)
    assert request.offset in (None, made.reservations[0].start)
    assert made.ram_left >= request.min_free
    _check_places(there, request, made.reservations)
    _check_kernel(there, made.memmap, made.reservations)
    assert plan.satisfied(there, replace(request, size=made.reservations[0].size), made.reservations)
    _check_offers(there, request)


def _check_places(there: Situation, request: Request, chosen: Sequence[Reservation]) -> None:
    assert all(a.end <= b.start for a, b in pairwise(chosen))
    line = there.command_line or cmdline.parse_command_line("")
    limits = [*line.mem_limits, *(i.size for i in line.items if i.op == "limit")]
    claims = [(i.start, i.start + i.size) for i in line.items if i.size and i.op not in ("limit", "exactmap")]
    claims += [(x.start, x.end) for x in there.losses] + [(s.start, s.end) for s in line.fake_mem]
    for r in chosen:
        assert r.start >= LOW_LIMIT
        assert r.start % (2 * MIB) == r.size % (2 * MIB) == 0
        assert any(
            e.kind is Kind.RAM and e.start <= r.start and r.end <= e.end for e in there.firmware.entries
        )
        assert not any(start < r.end and r.start < end for start, end in claims), "over another claim"
        assert not any(r.start < limit < r.end for limit in limits), "over a limit"
        on = {n.node for n in there.nodes if n.start < r.end and r.start < n.end}
        assert len(on) <= 1, "on two nodes"
        assert request.numa_node is None or on == {request.numa_node}
        for _, allowed in there.vetoes:
            covered = sum(max(0, min(b, r.end) - max(a, r.start)) for a, b in _joined(allowed))
            assert covered == r.size, "not RAM for another map"


def _joined(spans: Iterable[Span]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for span in sorted(spans):
        if found and span.start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], span.end))
        else:
            found.append((span.start, span.end))
    return found


def _check_kernel(there: Situation, memmap: str, chosen: Sequence[Reservation]) -> None:
    """The kernel's map has exactly these devices more, and at every other address what it has without them."""
    after = kernel_map.kernel_map(there, memmap)
    line = there.command_line or cmdline.parse_command_line("")
    before = e820.apply_memmap(there.firmware, line)
    ours = [(e.start, e.end) for e in after if any(e.start < r.end and r.start < e.end for r in chosen)]
    assert ours == [(r.start, r.end) for r in chosen], "not one range for each device"
    for edge in {x for e in (*before, *after) for x in (e.start, e.end)}:
        if not any(r.start <= edge < r.end for r in chosen):
            assert _kind_at(before, edge) == _kind_at(after, edge), f"another kind at {edge:#x}"


def _kind_at(entries: Sequence[MapEntry], where: int) -> Kind | None:
    return next((e.kind for e in entries if e.start <= where < e.end), None)


def _check_largest(there: Situation, request: Request, exc: NoPlan) -> None:
    """The largest size that is said to fit does, and nothing above it."""
    try:
        e820.apply_memmap(there.firmware, there.command_line or cmdline.parse_command_line(""))
    except EmupmemError:
        return  # the kernel stops at the words that are there already
    if exc.largest:
        made = plan.plan(there, replace(request, size=exc.largest))
        _check_kernel(there, made.memmap, made.reservations)
    with suppress(NoPlan):
        above = plan.plan(there, replace(request, size=exc.largest + 2 * MIB))
        raise AssertionError(f"{above.memmap} fits, and the largest is said to be {exc.largest}")


def _check_offers(there: Situation, request: Request) -> None:
    """What is offered of a range can be had, and no range gives more than the largest of them."""
    free = Request(min_free=request.min_free, numa_node=request.numa_node)
    offered = [o.at_most for o in plan.offers(there, free) if o.at_most]
    for size in offered[:8]:
        plan.plan(there, replace(free, size=size))
    with suppress(NoPlan):
        made = plan.plan(there, replace(free, size=max(offered, default=0) + 2 * MIB))
        raise AssertionError(f"{made.memmap} can be had and is not offered: {offered}")


_MAP = b"0-640K usable\n1M-3G usable\n0xfec00000-4G reserved\n"
PLANS = [
    b"size=1G\n" + _MAP + b"4G-21G usable\n",
    b"ro quiet crashkernel=256M hugepages=512\n"
    + _MAP
    + b"4G-20G usable\n20G-21G reserved\n21G-40G usable\n",
    b"size=1G count=4 min_free=0 mem=8G\n" + _MAP + b"4G-21G usable\n",
    b"memmap=2G$6G memmap=1G!30G efi_fake_mem=1G@9G\n" + _MAP + b"4G-64G usable\n",
    b"size=2G offset=6G numa_node=1\n" + _MAP + b"4G-40G usable\n0-5G node0\n5G-40G node1\n",
    b"size=512M memmap=1G%6G-1+12\n" + _MAP + b"4G-21G usable\n5G-6G lost\n0-7G ram\n8G-21G ram\n",
    b"size=3M\n4G-8G usable\n8G-12G usable\n12G-13G soft\n13G-14G pram\n14G-15G pmem\n15G-15555M usable\n",
]
_PLAN_TOKENS = (
    "size=1G size=2M size=16G count=2 count=4 offset=4G offset=5G min_free=0 min_free=2G numa_node=0 numa_node=1 "
    "mem=8G mem=5000M memmap=8G memmap=1G!30G memmap=1G$6G memmap=2G@5G memmap=1G#7G memmap=1G%6G-1+12 memmap=1G%6G-1 "
    "memmap=4G%4G+1 memmap=exactmap efi_fake_mem=1G@9G:0x40000 crashkernel=1G@8G crashkernel=0400M hugepages=9 nokaslr "
    "hugepagesz=1G 0-640K 1M-3G 4G-21G 8G-12G 0x100000000-0x1ffffffff usable reserved soft pram pmem bad lost node0 "
    "node1 ram"
)
PLAN_TOKENS = [w.encode() for w in _PLAN_TOKENS.split()]


# Files -----------------------------------------------------------------------------------------------

LIMIT = 4096
"""Bytes that may be read of a file here."""


@contextmanager
def _small_limits() -> Iterator[None]:
    names = ((system_plain, "LARGEST_FILE"), (system_plain, "LARGEST_LOG"))
    quick = ((pipe, "QUIET_SECONDS"), (pipe, "SILENT_SECONDS"), (pipe, "WRITER_SECONDS"))
    before = [(module, name, getattr(module, name)) for module, name in (*names, *quick)]
    try:
        for module, name, _ in before:
            setattr(module, name, LIMIT if "LARGEST" in name else 0)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _made(what: str, place: Path, data: bytes) -> Iterator[str]:
    """Something that can be named in the place of a file."""
    with ExitStack() as stack:
        if what == "pipe":
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            os.write(writing, data)
            os.close(writing)
            yield f"/dev/fd/{reading}"
            return
        if what in ("fifo", "alone"):
            os.mkfifo(place)
            if what == "fifo":
                both = os.open(place, os.O_RDWR)
                stack.callback(os.close, both)
                os.write(both, data)
        elif what == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(place))
        elif what == "folder":
            place.mkdir()
        elif what == "loop":
            place.symlink_to(place.name)
        elif what == "link":
            place.with_name("target").write_bytes(data)
            place.symlink_to("target")
        elif what == "device":
            place.symlink_to("/dev/zero")
        else:
            place.write_bytes(data)
        yield str(place)


KINDS = ("file", "link", "pipe", "fifo", "alone", "socket", "folder", "loop", "device")


def reader(data: bytes) -> None:
    """A file, or what a person gives in its place: its whole content, or refused where it is too long or has no end."""
    words, body = headed(data)
    what = words[0] if words and words[0] in KINDS else "file"
    with (
        tempfile.TemporaryDirectory() as folder,
        _small_limits(),
        _made(what, Path(folder, "it"), body) as name,
    ):
        if name.startswith(folder):
            _check_machine(Machine(folder), what, body)
        told: list[str] = []
        try:
            with streams.given_file(name, told.append) as file:
                seen = _whole(file, body[:2])
        except EmupmemError as exc:
            refused(exc)
            # an empty pipe without a writer is at its end; a FIFO whose writer stays is not
            assert what not in ("file", "link", "pipe") or len(body) > LIMIT, exc.message
            assert len(told) <= 1
            return
        assert what in ("file", "link", "pipe")
        assert len(body) <= LIMIT
        assert seen == body
        assert not told


def _whole(file: BinaryIO, head: bytes) -> bytes:
    """All of it, by pieces; whether it is packed is seen before, and nothing is lost by that."""
    assert streams.is_gzip(file) == (head == streams.GZIP)
    pieces = []
    while piece := file.read(700):
        pieces.append(piece)
    seen = b"".join(pieces)
    found = [bootlog.parse_boot_log(log, "it") for log in (io.BytesIO(seen), seen)]
    assert replace(found[0], problem=None) == replace(found[1], problem=None)
    return seen


def _check_machine(machine: Machine, what: str, body: bytes) -> None:
    """How a machine reads its own files: never a text that only begins as the file does."""
    well = what in ("file", "link") and len(body) <= LIMIT
    try:
        found = machine.read("/it")
    except EmupmemError as exc:
        refused(exc)
        assert not well
    else:
        assert found == (body if well else None), what
    peeked = machine.peek("/it")
    assert peeked == (body.decode("utf-8", "replace").strip("\n\0") if well else "")


READER = [
    kind.encode() + b"\n" + text
    for kind in KINDS
    for text in (b"", b"x", b"\x1f\x8b", b"a" * 4096, b"b" * 4097)
]
