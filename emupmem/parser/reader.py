# SPDX-License-Identifier: Apache-2.0
"""What each line of a boot's log says, line by line."""

from __future__ import annotations

import json

from emupmem.model import MIB, Loss, NodeRange
from emupmem.parser.blocks import MAX_ENTRIES, MAX_KEPT, MAX_LINES, Block, Boot, fold
from emupmem.parser.grammar import (
    MAX_ADDRESS,
    MAX_LOSSES,
    BrokenLineError,
    MapLine,
    map_line,
    pattern,
    takes_ram,
    visible,
)

_LONG_LINE = 8 << 10
_PAGE = 4096
MAX_MAP_LINES = 1 << 16
"""Lines of all the maps of a log: two thousand boots of a laptop, read in two seconds."""
_LAST_BOOT_HINT = "save the last boot alone: journalctl -k -b -o cat > FILE"
_WATCHED = 300
"""Lines after a map line that are looked at one by one."""
_PRINTK_MAX = 975  # the shortest limit of one printk record, kernel/printk/printk.c LOG_LINE_MAX

_FIRMWARE = ("BIOS-e820", "BIOS-e801", "BIOS-88", "Xen")
_HEADERS = {
    "BIOS-provided": "firmware",
    "extended": "extended",
    "user-defined": "user",
    "modified": "modified",
}
# Phrase, and a word that must be in the same line for it to be about memory.
_SYMPTOMS = (
    ("misaligned, unable to map", ""),
    ("failed with error -95", "pmem"),
    (".data .bss are not marked", "E820"),
    ("table full; ignoring", "820"),
    ("too many entries; ignoring", "820"),
    ("failed to register legacy persistent memory ranges", ""),
    ("devm_memremap_pages attempted on mixed region", ""),
    ("Conflicting mapping in same section", ""),
)
_UNFIT = (
    *("bad mem addr", "Memory failure: 0x", "MCE 0x", "Soft-offlining pfn: 0x", "soft offline: 0x"),
    "Reserving Intel graphics",
)


# Reading -------------------------------------------------------------------------------------


class LogReader:
    """Takes the lines of interest in order and keeps what they say of the last boot."""

    def __init__(self) -> None:
        self.before: Boot | None = None
        self.boot = Boot()
        self.open: Block | None = None  # the block that the last map line belongs to
        self.watch = 0  # so many lines are taken one by one
        self.map_lines = 0
        self.enough = False  # no log of a machine goes on so: it is not read on
        self.lively = False  # a map was seen since this was last asked

    def take(self, number: int, raw: bytearray) -> None:
        """Look at one line."""
        self.watch -= 1
        if len(raw) > _LONG_LINE:
            raw = self._shortened(number, raw)
        text = raw.decode("utf-8", "replace").strip(" \t\r\n\0")
        if "\x1b" in text:
            text = pattern("colour").sub("", text).strip()
        if not text:
            return
        before = self.open
        if before is not None:
            before.problem_is_last = False
        try:
            line = map_line(text)
        except BrokenLineError as exc:
            block = self._block_for(exc.who)
            block.blame(number, text, exc.why, exc.cut)
            self._count(block, number, text)
            self.watch = _WATCHED
            return
        if line is not None:
            self._add(line, number, text)
        else:
            self._other(number, text)
        if before is not None and (line is None or self.open is not before):
            before.followed = True

    def _shortened(self, number: int, raw: bytearray) -> bytearray:
        """What is kept of a very long line: what follows a run of NUL, as a crash leaves it in a log."""
        raw = raw.rstrip(b"\0").rpartition(b"\0")[2]
        if b"BIOS-e820: " in raw[_LONG_LINE:]:
            why = f"is somewhere in a line of {len(raw)} bytes"
            self._block_for("BIOS-e820").blame(number, raw[:100].decode("utf-8", "replace"), why)
        return raw[:_LONG_LINE]

    def _add(self, line: MapLine, number: int, text: str) -> None:
        block = self._block_for(line.who, line.start)
        block.who = line.who
        block.add(line, number, text)
        self._count(block, number, text)
        block.followed = False
        block.prefix = f"{line.lead}{line.who}: "
        self.watch, self.lively = _WATCHED, True

    def _count(self, block: Block, number: int, text: str) -> None:
        """Stop at more lines than a map, or the boots of a log, can have."""
        block.lines += 1
        self.map_lines += 1
        if block.lines > MAX_LINES:
            block.blame(number, text, f"is one of more than {MAX_ENTRIES}, which no kernel prints")
        elif self.map_lines > MAX_MAP_LINES:
            why = f"is one of more than {MAX_MAP_LINES} in a log of many boots"
            block.blame(number, text, why, hint=_LAST_BOOT_HINT)
        else:
            return
        block.problem_is_last = False
        self.enough = True

    def _block_for(self, who: str, start: int = 1) -> Block:
        """The block that a line of `who` belongs to: a new one where a map begins again."""
        name = "firmware" if who in _FIRMWARE else who
        block = self.boot.blocks.get(name)
        if (
            block is None
            or block.who not in ("", who)
            or (start == 0 and block.pieces and block.pieces[-1].start)
        ):
            block = self._new_block(name, 0)
        self.open = block
        return block

    def _new_block(self, name: str, header: int) -> Block:
        old = self.boot.blocks.get(name)
        block = self.boot.blocks[name] = Block(header=header)
        if name == "firmware" and old is not None:
            self.boot.replace(old)
        return block

    def _header(self, name: str, number: int) -> None:
        block = self.boot.blocks.get(name)
        if block is None or block.pieces or block.problem:
            block = self._new_block(name, number)
        block.header = block.header or number
        self.open = block
        self.watch, self.lively = _WATCHED, True

    def _other(self, number: int, text: str) -> None:
        """A line that is no entry of a map."""
        if "physical RAM map:" in text and (found := pattern("header").search(text)):
            self._header(_HEADERS[found[1]], number)
            return
        block = self.open if self.watch >= 0 else None
        if block is not None and block.problem is None and block.looks_cut(text):
            if not block.followed:
                block.blame(number, text, "is cut", cut=True)
            block.suspect = block.suspect or (number, text)
        elif "Linux version " in text and (said := _said("banner", text)) is not None:
            self._begin(Boot(said[:500], number))
        elif "ommand line:" in text and (said := _said("command line", text)) is not None:
            self._command_line(said)
        elif "SRAT: Node " in text:
            self._node(number, text)
        else:
            self._fact(number, text)
        for phrase, word in _SYMPTOMS:
            if phrase in text and word in text and len(self.boot.symptoms) < MAX_KEPT:
                self.boot.symptoms[visible(text, 200)] = None

    def _begin(self, boot: Boot) -> None:
        self.before = fold(self.before, self.boot)
        self.boot = boot
        self.open = None

    def _command_line(self, said: str) -> None:
        key, _, words = said.partition(" line:")
        words = words.strip()
        if key == "Command" and any(b.pieces for b in self.boot.blocks.values()):
            self._begin(Boot())  # it is printed before the map
        goes_on = words.endswith(" \\")  # Linux 7 prints long ones in pieces
        cut = not goes_on and (words.endswith(">") or len(said) >= _PRINTK_MAX)
        if cut or goes_on:
            words = words.rpartition(" ")[0]  # half a word could be read as something else
        if key == "Command":
            self.boot.early = words
        else:
            self.boot.late = f"{self.boot.late} {words}" if self.boot.late_goes_on else words
            self.boot.late_goes_on = goes_on
        (self.boot.cut_lines.add if cut else self.boot.cut_lines.discard)(key)

    def _node(self, number: int, text: str) -> None:
        found = pattern("srat").search(text)
        rest = found[6].strip(' \t",}') if found is not None else "?"
        if found is None or rest not in ("", "hotplug", "non-volatile", "hotplug non-volatile"):
            self.boot.bad_node = self.boot.bad_node or f'line {number} is not understood: "{visible(text)}"'
            return
        if "non-volatile" in rest or len(self.boot.nodes) >= MAX_ENTRIES:
            return
        start, end = (int(found[2] or found[4], 16), int(found[3] or found[5], 16))
        # Before Linux 3.5 the end was exclusive here as well; memory comes in whole pages.
        end += 1 if found[3] or end & 0xFFF == 0xFFF else 0
        if start < end <= MAX_ADDRESS:
            self.boot.nodes[NodeRange(int(found[1]), start, end)] = None

    def _loss(self, number: int, text: str) -> None:
        """A line that changes the map after it was printed. Source: e820.c, mtrr/cleanup.c."""
        boot, found = self.boot, pattern("taken").search(text)
        if found is None:
            if "update e820 for mtrr" in text:
                boot.lost = boot.lost or visible(text, 200)
            elif pattern("begun").search(text):
                boot.damaged = boot.damaged or visible(text, 200)
            return
        start = int(found["a"] or found["c"], 16)
        end = int(found["b"], 16) + 1 if found["b"] else int(found["d"], 16)
        if takes_ram(found["act"], found["rest"]):
            self._lose(start, end, found[0], number, text)

    def _lose(self, start: int, end: int, why: str, number: int, text: str) -> None:
        boot = self.boot
        if end <= start or len(boot.losses) >= MAX_LOSSES:
            boot.damaged = boot.damaged or visible(text, 200)
        else:
            boot.losses.setdefault((start, end), Loss(start, end, visible(why.strip(), 120), number))

    def _unfit(self, number: int, text: str) -> None:
        """Memory with bad cells, or that a device has."""
        found = pattern("unfit").search(text)
        if found is None:
            return
        if found["frame"]:
            start = int(found["frame"], 16) * _PAGE
            end = start + _PAGE
        else:
            start = int(found["a"], 16)
            end = int(found["end"], 16) if found["end"] else int(found["last"], 16) + 1
        self._lose(start, end, found["text"], number, text)

    def _fact(self, number: int, text: str) -> None:
        boot = self.boot
        if "EFI v" in text and _said("efi", text) is not None:
            boot.efi = True
        elif "DMI: " in text or "last_pfn = " in text:
            if "firmware" in boot.blocks and boot.blocks["firmware"].header:
                boot.past_efi.add("DMI" if "DMI: " in text else "pfn")
        elif "e820" in text and ("update" in text or "remove" in text):
            self._loss(number, text)
        elif "MTRRs don't cover all" in text:
            amount = pattern("losing").search(text)
            boot.lost, boot.lost_bytes = visible(text, 200), int(amount[1]) * MIB if amount else MAX_ADDRESS
        elif any(phrase in text for phrase in _UNFIT):
            self._unfit(number, text)
        elif "Memory Encryption Features" in text or "tdx: Guest" in text:
            if found := pattern("confidential").search(text):
                boot.confidential = "AMD SEV-SNP" if found[2] else "Intel TDX"
        elif "mirrored memory" in text and (found := pattern("mirrored").search(text)):
            boot.mirrored = found[0]
        elif " HIGHMEM available." in text or " LOWMEM available." in text or "non-PAE kernel" in text:
            boot.i386 = True  # arch/x86/mm/init_32.c; the notice on NX of arch/x86/mm/setup_nx.c
        elif "on Xen" in text and pattern("xen pv").search(text):
            boot.xen_pv = True  # arch/x86/xen/enlighten.c xen_banner; guests of their own say Xen HVM or PVH
        elif "Hypervisor detected: " in text and (found := pattern("hypervisor").search(text)):
            boot.hypervisor = visible(found[1].strip(), 40)


def _said(name: str, text: str) -> str | None:
    """The message from a phrase on, where it begins with it; escapes of JSON and /dev/kmsg undone."""
    found = pattern(name).search(text)
    if found is None:
        return None
    lead, said = text[: found.start()].rstrip(" \t"), text[found.start() :]
    if lead and not pattern("lead").search(lead[-40:]):
        return None
    if lead.endswith('"') and (string := pattern("string").match(said)):
        try:
            # half of a surrogate pair is no character
            return str(json.loads(f'"{string[0]}"')).encode("utf-8", "replace").decode()
        except ValueError:
            return string[0]
    if pattern("record").fullmatch(lead):
        return pattern("escape").sub(lambda m: chr(int(m[1], 16)), said)
    return said
