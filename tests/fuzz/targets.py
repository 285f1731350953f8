# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed, and who judges: each target takes bytes and raises where emupmem went wrong.

An EmupmemError is an answer, everything else that comes out of emupmem is a finding; so is an answer that
an independent look at the input disproves.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from emupmem.boot import entry as boot_entry
from emupmem.boot.bls import text as bls_text
from emupmem.boot.grub import menu as grub_menu
from emupmem.device import unit
from emupmem.editor import defaults, edits, lens, quoting
from emupmem.editor import shell as editor_shell
from emupmem.editor import text as editor_text
from emupmem.kernel import cmdline, e820
from emupmem.model import (
    GIB,
    BootLog,
    DeviceKind,
    EmupmemError,
    FirmwareMap,
    Kind,
    Request,
    Reservation,
    Span,
)
from emupmem.parser import bootlog, sources
from emupmem.planner import plan, survey
from emupmem.planner import situation as planner_situation
from emupmem.report import archive as report_archive
from emupmem.report import collected, gather, masking
from emupmem.system import pe
from tests import pe as pe_files
from tests.fuzz import bounds, shell, typed
from tests.fuzz.answers import headed, refused
from tests.fuzz.texts import LOGS, TOKENS, fixtures

Run = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A way into emupmem: `run` judges one input, `seeds` are where mutation begins."""

    name: str
    run: Run
    seeds: Callable[[], Sequence[bytes]]
    tokens: Sequence[bytes]
    longest: int = 8192

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]


# Logs ----------------------------------------------------------------------------------------------


class _Drops(io.RawIOBase):
    """A pipe: no seeking, and never as much as one asks for."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.most, self.at = data, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.data[self.at : self.at + min(self.most, len(buffer))]
        buffer[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)


def _ranges(firmware: FirmwareMap | None) -> list[tuple[int, int, str]] | None:
    return None if firmware is None else [(e.start, e.end, e.words) for e in firmware.entries]


def log(data: bytes) -> None:
    """A saved log: the map, the plan in it, read whole and in drops, with a line of the map cut."""
    found = bootlog.parse_boot_log(data, "it")
    if found.problem is not None:
        refused(found.problem)
    _check_map(found, data)
    for other in (
        bootlog.parse_boot_log(io.BufferedReader(_Drops(data, 1 + zlib.crc32(data) % 700)), "it"),
        bootlog.parse_boot_log(io.BytesIO(data), "it"),
    ):
        assert _ranges(other.firmware) == _ranges(found.firmware), "read in pieces it says something else"
        assert (other.command_line, other.nodes, other.efi) == (
            found.command_line,
            found.nodes,
            found.efi,
        )
    if found.firmware is not None:
        _check_cut(found.firmware, data)
    _check_plans(lambda: survey.of_log(io.BytesIO(data), "it"))


def _check_map(found: BootLog, data: bytes) -> None:
    """Every entry stands in its line of the text, in the kernel's digits; sorted and apart."""
    if found.firmware is None:
        return
    lines = data.split(b"\n")
    end = 0
    for entry in found.firmware.entries:
        assert end <= entry.start < entry.end, "not sorted"
        end = entry.end
        line = lines[entry.line - 1]
        new = f"0x{entry.start:016x}-0x{entry.end - 1:016x}]".encode()
        old = f"{entry.start:016x} - {entry.end:016x} (".encode()
        # colours may stand anywhere
        bare = re.sub(rb"\x1b(?:\[[0-9;:]*[A-Za-z]?)?", b"", line)
        assert new in bare or old in bare or old[:-1] in bare, f"line {entry.line} has no {entry}"
        assert entry.words.encode() in bare


def _check_cut(firmware: FirmwareMap, data: bytes) -> None:
    """A line of the map that lost its end is never read as another range, nor passed over in silence."""
    chance = zlib.crc32(data)
    entry = firmware.entries[chance % len(firmware.entries)]
    lines = data.split(b"\n")
    at = lines[entry.line - 1].rfind(b"0x")
    if at < 0 or entry.words.startswith("type ") or b"\r" in data or b"\0" in data:
        return
    lines[entry.line - 1] = lines[entry.line - 1][: at + chance % 22]
    cut = bootlog.parse_boot_log(b"\n".join(lines), "it")
    if cut.firmware is None or cut.warnings:
        return
    assert _ranges(cut.firmware) == _ranges(firmware), f"line {entry.line} was cut, and nothing said"


REQUESTS = (
    Request(),
    Request(GIB),
    Request(2 * 1024 * 1024, count=3, min_free=0),
    Request(GIB, offset=5 * GIB),
)


def _check_plans(look: Callable[[], survey.Survey]) -> None:
    try:
        situation = look().situation
    except EmupmemError as exc:
        refused(exc)
        return
    for request in REQUESTS:
        try:
            made = plan.plan(situation, request)
        except EmupmemError as exc:
            refused(exc)
            continue
        plan.offers(situation, request)
        plan.rejected(situation, request, made)
        _check_plan(situation, made.reservations)
        read = cmdline.parse_command_line(made.memmap)
        assert [(i.op, i.size, i.start) for i in read.items] == [
            ("!", r.size, r.start) for r in made.reservations
        ]


def _check_plan(situation: planner_situation.Situation, reservations: Iterable[Any]) -> None:
    """A reservation lies in RAM of the firmware's map and of no other claim, at or above 4 GiB."""
    taken = [Span(i.start, i.start + i.size) for i in (situation.command_line.items if situation.command_line else ())
             if i.op in "!#$" and i.size]  # fmt: skip
    for one in reservations:
        inside = [e for e in situation.firmware.entries if e.start <= one.start and one.end <= e.end]
        assert [e.kind for e in inside] == [Kind.RAM], "a reservation outside the RAM"
        assert one.start >= 4 * GIB
        assert not any(s.start < one.end and one.start < s.end for s in taken), (
            "a reservation over another claim"
        )
        taken.append(Span(one.start, one.end))


def tables(data: bytes) -> None:
    """/proc/iomem, /sys/firmware/memmap and the versions of kernels: the first word says which."""
    words, body = headed(data)
    text = body.decode("utf-8", "replace")
    what = words[0] if words else ""
    try:
        if what == "sysfs":
            rows = [line.split("|") for line in text.split("\n")]
            found = sources.parse_sysfs_memmap([(i, *r) for i, r in enumerate(rows) if len(r) == 3])  # type: ignore[misc]
            assert all(a.end <= b.start for a, b in pairwise(found.entries))
            line = cmdline.parse_command_line(" ".join(words[1:]))
            _check_table(found, line)
        elif what == "kernel":
            release = bootlog.kernel_release(text, " ".join(words[1:]))
            assert release is None or re.search(rf"0*{release.major}\.0*{release.minor}", text)
        else:
            lines = sources.parse_iomem(text)
            assert lines is None or len(lines) <= text.count("\n") + len(text.splitlines())
    except EmupmemError as exc:
        refused(exc)


# Command lines -------------------------------------------------------------------------------------


@cache
def _map() -> FirmwareMap:
    made = bootlog.parse_boot_log(LOGS[0]).firmware
    assert made is not None
    return made


def command_line(data: bytes) -> None:
    """/proc/cmdline: the words, what they do to the map, and that our own words are read back."""
    text = data.decode("utf-8", "surrogateescape")
    line = cmdline.parse_command_line(text)
    assert cmdline.parse_command_line(data[:2047].decode("utf-8", "surrogateescape")).words == line.words
    assert cmdline.is_cut(text) == (len(data.rstrip(b"\n")) > 2047)
    seen = data[:2047].partition(b"\0")[0]
    for word in line.words:
        assert word.replace("=", "").replace('"', "").encode("utf-8", "surrogateescape") in seen.replace(
            b"=", b""
        ).replace(b'"', b"")
    for item in line.items:
        assert 0 <= item.size < 1 << 64
        assert 0 <= item.start < 1 << 64
    cmdline.kaslr_avoided(line)
    _check_table(_map(), line)
    ours = [(i.size, i.start, i.soft) for i in line.reservations]
    with suppress(EmupmemError):
        kinds = {False: DeviceKind.PMEM, True: DeviceKind.DAX}
        wanted = [Reservation(start, size, 1, kind=kinds[soft]) for size, start, soft in ours]
        made = cmdline.parse_command_line(cmdline.format_memmap(wanted))
        assert [(i.size, i.start, i.soft) for i in made.items] == ours
    if len(data) < 1900 and not any(c in data for c in b"\0\"'") and b"--" not in data:
        more = cmdline.parse_command_line(text.rstrip(" \t\n\v\f\r\xa0\udca0") + " memmap=1G!9G")
        assert [i.text for i in more.items] == [*(i.text for i in line.items), "1G!9G"]


def _check_table(firmware: FirmwareMap, line: Any) -> None:
    try:
        made = e820.apply_memmap(firmware, line)
    except EmupmemError as exc:
        refused(exc)
        return
    assert all(a.end <= b.start for a, b in pairwise(made))
    assert all(e.start < e.end for e in made)


# GRUB's files --------------------------------------------------------------------------------------

VARIABLES = editor_text.VARIABLES
_ITEM = re.compile(r"(?:0[xX][0-9a-fA-F]+|[0-9]+)[KMGTPEkmgtpe]?!(?:0[xX][0-9a-fA-F]+|[0-9]+)[KMGTPEkmgtpe]?")


@dataclass(frozen=True)
class _Wish:
    remove: bool
    variable: str
    items: tuple[str, ...]
    extra: tuple[str, ...]
    drop: tuple[str, ...]


def _wish(words: Sequence[str]) -> _Wish:
    variable = next((v for v in VARIABLES if v in words), VARIABLES[0])
    items = tuple(w for w in words if "!" in w)
    return _Wish(
        "remove" in words,
        variable,
        items,
        tuple(w[1:] for w in words if w.startswith("+")),
        tuple(w[1:] for w in words if w.startswith("-")),
    )


def _without_ours(value: str, drop: Sequence[str] = ()) -> list[str]:
    """The words of a value that are not ours, by a splitter of our own: blanks outside quotes."""
    return [left for word in _split(value) if word not in drop and (left := _left_of(word))]


def _split(value: str) -> list[str]:
    return re.findall(
        r"""(?:\\.|"(?:\\.|[^"\\])*(?:"|\Z)|'[^']*(?:'|\Z)|[^\s\\"']|\\\Z)+""", value, re.S | re.A
    )


def _left_of(word: str) -> str:
    """A word without our items, empty where nothing is left."""
    if not word.startswith("memmap="):
        return word
    parts = word.removeprefix("memmap=").split(",")
    others = [p for p in parts if not _ITEM.fullmatch(p)]
    if len(others) == len(parts):
        return word
    return f"memmap={','.join(others)}" if others else ""


def _ours(value: str) -> list[str]:
    return [
        p for w in _split(value) if w.startswith("memmap=") for p in w[7:].split(",") if _ITEM.fullmatch(p)
    ]


def edit(data: bytes) -> None:
    """/etc/default/grub: an edit is exactly as planned for dash, and nothing else is another; or refused."""
    words, text = headed(data)
    wish = _wish(words)
    judge = shell.judge
    try:
        defaults.read_grub_file(text, sh=judge)
        if wish.remove:
            after = defaults.remove_items(text, wish.items or None, sh=judge)
        else:
            after = defaults.set_items(text, wish.variable, wish.items, wish.extra, wish.drop, sh=judge)
            defaults.prove(
                text, after, wish.variable, wish.items, extra_words=wish.extra, drop_words=wish.drop, sh=judge
            )
    except EmupmemError as exc:
        refused(exc)
        return
    _check_edit(text, after, wish)
    assert defaults.undo(after, text, after, sh=judge) == text, "undo does not give the old bytes back"
    if wish.remove:
        assert defaults.remove_items(after, wish.items or None, sh=judge) == after, (
            "a second removal changes more"
        )
    else:
        again = defaults.set_items(after, wish.variable, wish.items, wish.extra, wish.drop, sh=judge)
        assert again == after, "a second edit changes more"


def _check_edit(text: bytes, after: bytes, wish: _Wish) -> None:
    """What dash makes of both texts, without a line of the editor in between."""
    before, repeat, now = shell.sourced(text), shell.sourced(text), shell.sourced(after)
    if before is None or now is None:
        assert before is now, "dash reads one of them only"
        return
    for name in sorted((before.keys() | now.keys()) - set(VARIABLES)):
        old, new = before.get(name), now.get(name)
        if old == new or repeat is None or repeat.get(name) != old:
            continue
        # what is made of one of ours may have our words in it, and nothing else that is new
        strip = [" ".join(_without_ours(v or "", wish.drop + wish.extra)) for v in (old, new)]
        assert strip[0].replace(" ", "") == strip[1].replace(" ", ""), f"{name} is another: {old!r} {new!r}"
    for name in VARIABLES:
        old, new = before.get(name), now.get(name)
        if repeat is not None and repeat.get(name) != old:
            continue
        mine = not wish.remove and name == wish.variable
        if wish.remove:
            kept = [i for i in _ours(old or "") if wish.items and i not in wish.items]
            assert _ours(new or "") == kept, f"{name} has {_ours(new or '')} instead of {kept}"
        else:
            assert _ours(new or "") == (list(wish.items) if mine else []), f"{name} is {new!r}"
        was = _without_ours(old or "", wish.drop if mine else ())
        if mine:
            was += [w for w in dict.fromkeys(wish.extra) if w not in was]
        got = _without_ours(new or "")
        assert got == was, f"other words of {name}: {was!r} became {got!r}"


def effective(data: bytes) -> None:
    """/etc/default/grub and drop-ins: the values are those that dash comes to, the decider has it in its text."""
    texts = [(f"/etc/default/grub.d/{i}.cfg", part) for i, part in enumerate(data.split(b"\n%%\n"))]
    try:
        found = defaults.effective(texts, sh=shell.judge)
    except EmupmemError as exc:
        refused(exc)
        return
    seen, again = (shell.sourced(*(part for _, part in texts)) for _ in range(2))
    assert seen is not None, "dash does not get to the end"
    for name in VARIABLES:
        if again is None or again.get(name) != seen.get(name):
            continue
        value = found[name].value
        assert (
            None if value is None else value.encode("utf-8", "surrogateescape").decode("latin-1")
        ) == seen.get(name)
        assert list(found[name].items) == _ours(value or "")


def undo(data: bytes) -> None:
    """Undo by lines: what it gives back is the current text with our change taken out, or nothing."""
    parts = [*data.split(b"\n%%\n"), b"", b""][:3]
    current, before, after = parts
    made = edits.undo_lines(current, before, after)
    if made is None:
        return
    if current == after:
        assert made == before
        return
    assert sorted((made + b"\n" + after).split(b"\n")) == sorted((current + b"\n" + before).split(b"\n")) or (
        b"\n" not in (current[-1:], before[-1:], after[-1:])
        or sorted((made + after).split(b"\n")) == sorted((current + before).split(b"\n"))
    ), "lines were lost or invented"


def menu(data: bytes) -> None:
    """grub.cfg: the entries, the default one, what of a value reaches the kernel."""
    words, body = headed(data)
    text = body.decode("utf-8", "surrogateescape")
    found = grub_menu.entries(text)
    lines = text.splitlines()
    for entry in found:
        assert entry.kernel
        assert lines[entry.line - 1].split()[0] in ("linux", "linux16", "linuxefi")
        assert len(entry.titles) == len(entry.ids) == len(entry.index)
        assert isinstance(entry.release, str)
        assert entry.command_line.text == entry.text
    grubenv = dict(w.split("=", 1) for w in words if "=" in w)
    chosen = grub_menu.default_entry(text, grubenv)
    assert chosen is None or chosen in found
    grub_menu.whole(text)
    grub_menu.uses_bls(text)
    assert re.fullmatch(r"C|C\.UTF-8|[A-Za-z_@]+\.UTF-8", grub_menu.language(text))
    items = [w for w in words if "!" in w]
    for _, why in boot_entry.problems(found, items, items[:1]):
        assert why
    line = " ".join(words)
    if not any(c in line for c in "'\"\\#$"):
        assert grub_menu.kernel_text(line) == line


def boot_unit(data: bytes) -> None:
    """The unit that mounts at boot: what is read of it is written and read again."""
    text = data.decode("utf-8", "replace")
    try:
        found = unit.read_all(text)
    except EmupmemError as exc:
        refused(exc)
        return
    with suppress(EmupmemError):  # somebody else's words, which we would not write
        assert unit.read_all(unit.unit_text(found, "/usr/local/bin/emupmem")) == found


_KERNEL_BLANKS = " \t\n\v\f\r\xa0"


def _kernel_words(text: str) -> list[str]:
    """The words as the kernel splits them, by a splitter of our own: bytes, blanks outside double quotes."""
    seen = text.encode("utf-8", "surrogateescape").partition(b"\0")[0].decode("latin-1")
    words, word, quoted = [], "", False
    for char in seen + " ":
        if char in _KERNEL_BLANKS and not quoted:
            words += [word.replace('"', "")] if word else []
            word = ""
            continue
        quoted ^= char == '"'
        word += char
    return words + ([word.replace('"', "")] if quoted else [])


def entry(data: bytes) -> None:
    """An entry of the Boot Loader Specification, or /etc/kernel/cmdline: reworked as planned, or refused."""
    words, body = headed(data)
    text = body.decode("utf-8", "surrogateescape")
    wish = _wish(words)
    items = tuple(dict.fromkeys(i for i in wish.items if re.fullmatch(r"[1-9]\d?G![1-9]\d{0,2}G", i, re.A)))
    extra = tuple(
        w for w in wish.extra if re.fullmatch(r"[a-z.=]+", w) and w not in wish.drop and "memmap" not in w
    )
    bls_text.grub_line(bls_text.options(text), {"kernelopts": "ro quiet"})
    for rework, line_of in (
        (bls_text.rework_entry, bls_text.options),
        (bls_text.rework_file, bls_text.file_line),
    ):
        try:
            after = rework(text, items, extra, wish.drop)
            before_line, line = line_of(text), line_of(after)
            bls_text.prove_words(before_line, line, items, extra, wish.drop)
        except EmupmemError as exc:
            refused(exc)
            continue
        if "--" in _kernel_words(before_line) or max(len(data), len(line)) > 1500:
            continue  # what stands behind them is not the kernel's
        was, now = _kernel_words(before_line), _kernel_words(line)
        assert [i for w in now for i in _ours_of(w)] == list(items), f"{line!r} does not have {items}"
        wanted = [left for w in was if w not in wish.drop and (left := _left_of(w))]
        wanted += [w for w in dict.fromkeys(extra) if w not in wanted]
        got = [left for w in now if (left := _left_of(w))]
        assert sorted(got) == sorted(wanted), "other words"
        assert rework(after, items, extra, wish.drop) == after, "a second time changes more"
        if line_of is bls_text.options:
            mine = re.compile(r"\s*options[ \t]")
            kept = [[x for x in t.split("\n") if not mine.match(x)] for t in (text, after)]
            assert kept[0] == kept[1], "another line of the entry was touched"


def program(data: bytes) -> None:
    """The texts of a PE file: within bounds, of the file itself, and the same once an archive has told them."""
    file = pe.read_pe(io.BytesIO(data))
    if file is None:
        return
    assert 0 <= file.kernel < 1 << 32
    for name, text in file.texts.items():
        assert name in pe.TEXTS
        assert len(text) <= pe.LARGEST_TEXT
        assert text.encode("utf-8", "surrogateescape") in data
    again = pe.told_pe(file.shown)
    assert again is not None
    assert (again.line, again.maker, again.signed) == (file.line, file.maker, file.signed)


def _ours_of(word: str) -> list[str]:
    return (
        [p for p in word.removeprefix("memmap=").split(",") if _ITEM.fullmatch(p)]
        if "memmap=" in word[:7]
        else []
    )


# Archives ------------------------------------------------------------------------------------------


@cache
def _base() -> report_archive.Archive:
    """An archive of a machine in a folder, as `emupmem collect` makes it."""
    from tests.fake import build, put

    with tempfile.TemporaryDirectory() as folder:
        machine = build(Path(folder))
        put(machine, "/proc/iomem", "00000000-bfffffff : System RAM\n100000000-53fffffff : System RAM\n")
        put(machine, "/proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
        for number, (start, end) in enumerate((("0x0", "0xbfffffff"), ("0x100000000", "0x53fffffff"))):
            for key, value in (("start", start), ("end", end), ("type", "System RAM")):
                put(machine, f"/sys/firmware/memmap/{number}/{key}", value + "\n")
        return gather.gather_machine(machine).archive


def recipe(data: bytes) -> report_archive.Archive:
    """The archive of a machine with some members replaced: `@NAME` begins one, `@facts` is merged as JSON."""
    base = _base()
    facts: dict[str, Any] = copy.deepcopy(dict(base.facts))
    members = dict(base.members)
    for part in re.split(rb"(?:^|\n)@", data)[1:]:
        head, _, body = part.partition(b"\n")
        name = head.decode("utf-8", "surrogateescape")
        if name == "facts":
            with suppress(ValueError, RecursionError):
                _merge(facts, json.loads(body))
        elif name.startswith("-"):
            members.pop(name[1:], None)
        else:
            members[name] = body
    return report_archive.Archive(facts, members)


def _merge(old: dict[str, Any], new: Any) -> None:
    if not isinstance(new, dict):
        return
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        else:
            old[key] = value


def archive(data: bytes) -> None:
    """An archive of `emupmem collect` that anybody may have made: planned from, and diagnosed."""
    made = recipe(data)
    if any("\0" in name for name in made.members):
        return  # no file system has such a name, and tar ends it there
    try:
        packed = report_archive.pack(made)
    except (UnicodeError, ValueError):
        return  # a name that no archive can hold
    try:
        read = report_archive.unpack(io.BytesIO(packed), "it")
    except EmupmemError as exc:
        refused(exc)
        return
    assert dict(read.members) == dict(made.members)
    _check_plans(lambda: collected.plan_from(read, "it"))
    try:
        findings = collected.doctor_from(read, "it")
    except EmupmemError as exc:
        refused(exc)
        return
    assert findings


def tar(data: bytes) -> None:
    """The layers of an archive: gzip, tar and their headers. The first byte says how much is wrapped here."""
    kind, body = data[:1], data[1:]
    if kind == b"t":
        body = gzip.compress(_summed(body), 1, mtime=0)
    elif kind == b"g":
        body = b"\x1f\x8b" + body
    try:
        read = report_archive.unpack(io.BufferedReader(_Drops(body, 1 + zlib.crc32(data) % 5000)), "it")
    except EmupmemError as exc:
        refused(exc)
        return
    for name in read.members:
        assert not name.startswith("/")
        assert not {"", ".", ".."} & set(name.split("/"))
    assert dict(report_archive.unpack(io.BytesIO(report_archive.pack(read)), "it").members) == dict(
        read.members
    )


def _summed(data: bytes) -> bytes:
    """A tar with the checksums of its headers put right, or nothing behind them would ever be looked at."""
    out = bytearray(data)
    at = 0
    while at + 512 <= len(out):
        block = out[at : at + 512]
        if any(block):
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            out[at + 148 : at + 156] = b"%06o\0 " % total
        size = 0
        with suppress(ValueError):
            size = int(bytes(block[124:136]).strip(b" \0") or b"0", 8)
        at += 512 + (size + 511) // 512 * 512 if 0 <= size < len(out) else 512
    return bytes(out)


def masks(data: bytes) -> None:
    """What `emupmem collect` writes of a hostile log: the secrets are out of it, the map still in it."""
    text = data.decode("utf-8", "surrogateescape")
    masker = masking.Masker(["thinkbox"], ["mallory"])
    masker.learn(text)
    shown, _ = masker.mask(text)
    assert not re.search(
        r"(?<![A-Za-z0-9])thinkbox(?![A-Za-z0-9])", re.sub(r"memmap=[^\s\"']*", "", shown), re.I
    )
    assert "/home/mallory/" not in re.sub(r"memmap=[^\s\"']*", "", shown)
    assert re.findall(r"memmap=[^\s\"']*", text) == re.findall(r"memmap=[^\s\"']*", shown)


# Length ----------------------------------------------------------------------------------------------


def _tables_of(kind: str) -> Run:
    return lambda data: tables(kind.encode() + b"\n" + data)


READERS: dict[str, Run] = {
    "log": lambda data: _quietly(lambda: bootlog.parse_boot_log(data)),
    "iomem": _tables_of("iomem"),
    "kernel": _tables_of("kernel"),
    "command-line": lambda data: _quietly(lambda: cmdline.parse_command_line(data.decode("latin-1"))),
    "memmap": lambda data: _quietly(lambda: cmdline.parse_memmap_value(data.decode("latin-1"))),
    "menu": lambda data: _quietly(lambda: _whole_menu(data.decode("latin-1"))),
    "layout": lambda data: _quietly(lambda: _layout(data.decode("latin-1").replace("\0", ""))),
    "words": lambda data: _quietly(lambda: quoting.items_of(data.decode("latin-1"))),
    "said": lambda data: _said(data.decode("latin-1")),
    "mask": lambda data: _quietly(lambda: masks(data)),
    "mountinfo": lambda data: archive(b"@tree/proc/self/mountinfo\n" + data),
    "config": lambda data: archive(b"@tree/boot/config-6.12.0-1-amd64\n" + data),
    "modprobe": lambda data: archive(b"@tree/etc/modprobe.d/a.conf\n" + data),
    "grubenv": lambda data: archive(b"@tree/boot/grub/grubenv\n" + data),
    "unit": lambda data: boot_unit(unit.MARK.encode() + b"\n" + data),
    "exec": lambda data: boot_unit(unit.MARK.encode() + b"\nExecStart=" + data.replace(b"\n", b" ")),
    "entry": lambda data: entry(b"1G!4G +quiet -ro\n" + data),
    "options": lambda data: entry(b"1G!4G +quiet -ro\noptions " + data.replace(b"\n", b" ")),
}  # fmt: skip


def _quietly(call: Callable[[], object]) -> None:
    with suppress(EmupmemError):
        call()


def _whole_menu(text: str) -> None:
    found = grub_menu.entries(text)
    grub_menu.default_entry(text, {})
    grub_menu.whole(text)
    grub_menu.uses_bls(text)
    grub_menu.language(text)
    grub_menu.kernel_text(text)
    boot_entry.problems(found[:50], [], [])


def _said(text: str) -> None:
    """What sh printed of a file: in an assignment as `set` writes it, and as complaints."""
    value = "'" + text.replace("'", "'\"'\"'") + "'"
    editor_shell._sourced("\0" * 4 + f"A={value}\nB=''\n", text, 0, 1)


def _layout(text: str) -> None:
    editor_text.checked_text(text, "f")
    lens.layout_of.cache_clear()
    lens.layout_of(text)
    lens.line_of(VARIABLES[0], text)
    with suppress(quoting.OddValueError):
        quoting.chars_of(text)
    for source in (text, f'{VARIABLES[0]}="{text}"\n'):
        edits.stripped(source, None)
        lens._plain_lines(source)


LONG = 60_000
"""Bytes that a piece is repeated to: a quadratic pattern takes 10^9 steps on them."""


def pump(data: bytes) -> None:
    """One piece many times over, for each reader: the limit of work finds what grows with the square.

    The first line names the reader; what follows are the beginning, the piece and the end, with %% between.
    """
    words, body = headed(data)
    reader = READERS.get(words[0] if words else "", READERS["log"])
    head, piece, tail = [*body.split(b"%%", 2), b"", b""][:3]
    reader(head + (piece or b" ") * (LONG // max(1, len(piece))) + tail)


# All ---------------------------------------------------------------------------------------------------


def _grub_seeds(*heads: bytes) -> Callable[[], list[bytes]]:
    return lambda: [head + b"\n" + text for head in heads for text in fixtures("grub")]


def _program_seeds() -> list[bytes]:
    profile = [(".profile", b"ID=x"), (".cmdline", b"quiet")]
    return [
        pe_files.unified("6.12.0", "root=UUID=0", more=profile),
        pe_files.addon("memmap=1G!4G", signed=True),
    ]


def _archive_seeds() -> list[bytes]:
    base = _base()
    seeds = [
        b"@" + name.encode() + b"\n" + data for name, data in sorted(base.members.items()) if len(data) < 4000
    ]
    facts = json.loads(json.dumps(dict(base.facts)))
    seeds += [b"@facts\n" + json.dumps({key: value}).encode() for key, value in facts.items()]
    return [*seeds, *(b"@-" + name.encode() + b"\n" for name in base.members)]


def _tar_seeds() -> list[bytes]:
    out = io.BytesIO()
    facts = json.dumps(dict(_base().facts)).encode()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, data in (
            (report_archive.MARKER, facts),
            ("tree/" + "n" * 120, b"x"),
            ("commands/dmesg", b"y" * 600),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    whole = out.getvalue().rstrip(b"\0") + bytes(1024)
    packed = gzip.compress(whole, 9, mtime=0)
    return [b"t" + whole, b"g" + packed[2:], b"r" + packed]


def _log_seeds() -> list[bytes]:
    return list(LOGS)


def _undo_seeds() -> list[bytes]:
    texts = [t for t in fixtures("grub") if len(t) < 500]
    return [b"\n%%\n".join((b"# new\n" + t + b"X=1\n", t, t + b"X=1\n")) for t in texts]


def _mask_seeds() -> list[bytes]:
    from tests.report.test_collect import CMDLINE, EXTRA_LOG

    return [EXTRA_LOG.encode(), CMDLINE.encode(), *LOGS[:2]]


def _menu_seeds() -> list[bytes]:
    text = _base().members["tree/boot/grub/grub.cfg"]
    return [b"saved_entry=0 1G!4G\n" + text, b"next_entry=a>b quiet\n" + text]


def _pump_seeds() -> list[bytes]:
    return [f"{name}\n%%{piece}%%\n".encode() for name in READERS for piece in (" ", "a", "\n", "'", "a=")]


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("log", log, _log_seeds, TOKENS["log"], 12_000),
        Target("tables", tables, lambda: fixtures("tables"), TOKENS["log"]),
        Target("cmdline", command_line, lambda: fixtures("cmdline"), TOKENS["cmdline"], 3000),
        Target("edit", edit, _grub_seeds(b"set GRUB_CMDLINE_LINUX 1G!4G +nokaslr -quiet",
               b"set GRUB_CMDLINE_LINUX_DEFAULT 1G!4G 2G!8G", b"remove"), TOKENS["grub"], 3000),
        Target("effective", effective, lambda: [b"\n%%\n".join(fixtures("grub")[i : i + 2]) for i in range(0, 60, 2)],
               TOKENS["grub"], 3000),
        Target("undo", undo, _undo_seeds, TOKENS["grub"], 3000),
        Target("menu", menu, _menu_seeds, TOKENS["menu"]),
        Target("unit", boot_unit, lambda: fixtures("unit"), TOKENS["cmdline"], 4000),
        Target("entry", entry, lambda: fixtures("entry"), [*TOKENS["entry"], *TOKENS["cmdline"]], 2000),
        Target("program", program, _program_seeds, [s.encode() for s in (*pe.TEXTS, ".linux", ".profile")], 24_000),
        Target("archive", archive, _archive_seeds, TOKENS["archive"]),
        Target("tar", tar, _tar_seeds, TOKENS["tar"], 16_000),
        Target("mask", masks, _mask_seeds, TOKENS["mask"]),
        Target("sizes", bounds.sizes, lambda: [w.encode() for w in bounds.SIZES], TOKENS["cmdline"], 200),
        Target("plans", bounds.plans, lambda: bounds.PLANS, bounds.PLAN_TOKENS, 1500),
        Target("reader", bounds.reader, lambda: bounds.READER, [k.encode() for k in bounds.KINDS]),
        Target("words", typed.command, typed.seeds, typed.tokens(), 300),
        Target("pump", pump, _pump_seeds, [*TOKENS["log"], *TOKENS["grub"], *TOKENS["menu"]], 300),
    )
}  # fmt: skip
