# SPDX-License-Identifier: Apache-2.0
"""Lines that belong together: a map, and the boots that a text holds."""

from __future__ import annotations

from dataclasses import field
from itertools import pairwise

from emupmem.model import MIB, EmupmemError, Kind, Loss, MapEntry, NodeRange
from emupmem.parser.grammar import MapLine, pattern, visible
from emupmem.record import open_record

MAX_ENTRIES = 4096  # the kernel's own table has at most 128 + 3 * 1024
MAX_LINES = 2 * MAX_ENTRIES
"""Lines of one map, with those that the console and the log print twice: a log with more is not read on."""
MAX_KEPT = 64  # symptoms

WHOLE_LOG_HINT = (
    "on the machine itself leave the log away, or save a whole one: journalctl -k -b -o cat > FILE"
)
_CUT_HINT = "if the lines are wrapped or cut, save the log as it is printed: journalctl -k -b -o cat > FILE"


# Blocks --------------------------------------------------------------------------------------


@open_record
class Block:
    """The lines of one printed map."""

    who: str = ""
    header: int = 0  # line number, 0 where the header was not seen
    pieces: list[MapEntry] = field(default_factory=list)
    gaps: set[int] = field(default_factory=set)  # starts of the pieces that are no entries
    first_text: str = ""
    problem: EmupmemError | None = None
    problem_is_last: bool = False  # it is a cut line, and nothing follows it
    followed: bool = False  # other lines follow the last one
    suspect: tuple[int, str] | None = None  # one of them, which would be a cut line if the map went on
    prefix: str = ""  # what stands before the range in the last line
    lines: int = 0  # all that were taken for lines of it, broken ones too
    old_words: bool = False  # as kernels before 3.5 print it

    @property
    def first_line(self) -> int:
        return self.header or (self.pieces[0].line if self.pieces else 0)

    def blame(self, number: int, text: str, why: str, cut: bool = False, hint: str = _CUT_HINT) -> None:
        if self.problem is None:
            self.problem = EmupmemError(f'line {number} of the map {why}: "{visible(text)}"', hint)
            self.problem_is_last = cut

    def add(self, line: MapLine, number: int, text: str) -> None:
        if self.problem is None and self.suspect is not None:
            self.blame(*self.suspect, "is cut")
        if self.problem is not None:
            return
        piece = MapEntry(line.start, line.end, line.kind or Kind.UNKNOWN, line.words, number)
        last = self.pieces[-1] if self.pieces else None
        if last is None:
            self.first_text = text
        elif (last.start, last.end, last.words) == (piece.start, piece.end, piece.words):
            return  # printed twice, by the console and the log
        elif piece.start < last.end:
            self.blame(number, text, f"overlaps or runs behind line {last.line}")
            return
        if len(self.pieces) >= MAX_ENTRIES:
            self.blame(number, text, f"is one of more than {MAX_ENTRIES}, which no kernel prints")
            return
        self.pieces.append(piece)
        self.old_words = line.old
        if line.kind is None:
            self.gaps.add(piece.start)

    def looks_cut(self, text: str) -> bool:
        """Whether a line without an entry is the beginning of a map line, or one that lost its beginning."""
        if not self.prefix or not text.strip(" \t>|"):
            return False
        if "0x0" in text or " - 0" in text:
            found = pattern("any range").search(text)
            if found is not None and _shape(self.prefix).endswith(_shape(text[: found.start()])):
                return True
        return len(text) < len(self.prefix) and _shape(self.prefix).startswith(_shape(text))

    def entries(self) -> tuple[MapEntry, ...]:
        """The entries, if they are all that was printed. Raises EmupmemError, for any doubt."""
        if self.problem is not None and not (self.problem_is_last and self.pieces):
            raise self.problem
        if not self.pieces:
            raise EmupmemError(
                f"line {self.header} announces a memory map, but no line of it follows", WHOLE_LOG_HINT
            )
        first = self.pieces[0]
        if first.start >= (MIB if self.header else 1):
            raise EmupmemError(
                f'the beginning of the map is lost: it starts with line {first.line}, "{visible(self.first_text)}"',
                WHOLE_LOG_HINT,
            )
        if first.start and self.header and first.line != self.header + 1:
            raise EmupmemError(
                f"line {self.header + 1} should be the first of the map, but the map starts with line {first.line}, "
                f'"{visible(self.first_text)}"',
                _CUT_HINT,
            )
        if self.gaps:
            self._check_gaps()
        return tuple(p for p in self.pieces if p.start not in self.gaps)

    def _check_gaps(self) -> None:
        """Linux 7 prints a line for each hole, so that a lost line shows as a hole without one."""
        if self.pieces[0].start:
            raise EmupmemError(f"a line of the map is lost before line {self.pieces[0].line}", WHOLE_LOG_HINT)
        for last, piece in pairwise(self.pieces):
            if last.end != piece.start:
                raise EmupmemError(
                    f"a line of the map is lost between lines {last.line} and {piece.line}", WHOLE_LOG_HINT
                )


_NO_DIGITS = str.maketrans("123456789", "000000000")


def _shape(text: str) -> str:
    return text.translate(_NO_DIGITS)


@open_record
class Boot:
    """What was seen of one boot."""

    banner: str = ""
    banner_line: int = 0
    early: str = ""  # "Command line:"
    late: str = ""  # "Kernel command line:", printed again once more is known
    late_goes_on: bool = False
    cut_lines: set[str] = field(default_factory=set)  # those two, where their ends are lost
    blocks: dict[str, Block] = field(default_factory=dict)
    earlier: Block | None = None  # the firmware map before blocks["firmware"]
    differ: EmupmemError | None = None
    efi: bool = False
    past_efi: set[str] = field(default_factory=set)
    hypervisor: str = ""
    nodes: dict[NodeRange, None] = field(default_factory=dict)
    bad_node: str = ""
    symptoms: dict[str, None] = field(default_factory=dict)
    losses: dict[tuple[int, int], Loss] = field(default_factory=dict)
    damaged: str = ""  # a line that should be a loss and cannot be read
    lost: str = ""  # the line that says how much was lost to the MTRRs, or that some was
    lost_bytes: int = 0
    i386: bool = False
    xen_pv: bool = False
    confidential: str = ""  # the kind of a guest whose memory its host cannot read
    mirrored: str = ""  # the line that says how much of the memory is mirrored

    def replace(self, old: Block) -> None:
        """Compare a finished firmware map with the one before it, and remember it as that."""
        if self.earlier is not None and _ranges(self.earlier) != _ranges(old) and self.differ is None:
            lines = f"the one from line {self.earlier.first_line} and the one from line {old.first_line}"
            self.differ = EmupmemError(
                f"the log has two firmware maps of one boot that differ: {lines}", WHOLE_LOG_HINT
            )
        self.earlier = old

    def is_echo_of(self, other: Boot) -> bool:
        """Whether this is no boot, but a repeated banner (`cat /proc/version` on the console)."""
        return not self.blocks and self.banner == other.banner and self.early in ("", other.early)


def _ranges(block: Block) -> list[tuple[int, int, str]]:
    return [(p.start, p.end, p.words) for p in block.pieces]


def fold(before: Boot | None, boot: Boot) -> Boot:
    if before is None or not boot.is_echo_of(before):
        return boot
    before.symptoms |= dict(list(boot.symptoms.items())[: MAX_KEPT - len(before.symptoms)])
    before.nodes |= boot.nodes
    return before
