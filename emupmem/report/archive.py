# SPDX-License-Identifier: Apache-2.0
"""The archive of a report: packed, and read back with suspicion."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

from emupmem.editor.shell import Sourced
from emupmem.editor.text import VARIABLES
from emupmem.model import MIB, EmupmemError, NodeRange
from emupmem.record import record
from emupmem.report import untar
from emupmem.system.sysfs import Region

FORMAT = 1
"""The version of the archive's layout: a reader refuses one that it does not know."""

MARKER = "emupmem.json"
DOCTOR = "doctor.json"
TREE, COMMANDS = "tree", "commands"

LARGEST_FILE = 16 * MIB
"""What is longer is cut at its end when it is written, and refused when it is read."""

LARGEST_ARCHIVE = 128 * MIB
MOST_MEMBERS = 20_000


@record
class Archive:
    """What an archive holds: `facts` of the marker, and the content of each other member by its name."""

    facts: Mapping[str, Any]
    members: Mapping[str, bytes]


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


# Writing and reading -------------------------------------------------------------------------------


def pack(archive: Archive) -> bytes:
    """The bytes of an archive: the marker first, then the members by name; no time, no owner."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in ((MARKER, as_json(archive.facts)), *sorted(archive.members.items())):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class _Bounded:
    """A stream that ends in an error where it gives more than an archive may hold."""

    def __init__(self, stream: BinaryIO, most: int, name: str) -> None:
        self.stream, self.left, self.name_shown = stream, most, name

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise EmupmemError(f"{self.name_shown}: larger than {LARGEST_ARCHIVE // MIB} MiB once unpacked")
        return data


def unpack(stream: BinaryIO, name: str) -> Archive:
    """Read an archive that anybody may have made: one of ours, or EmupmemError. Nothing is written. Pure."""
    members: dict[str, bytes] = {}
    facts: Mapping[str, Any] | None = None
    try:
        with gzip.GzipFile(fileobj=stream, mode="rb") as packed:
            bounded = _Bounded(packed, LARGEST_ARCHIVE, name)  # type: ignore[arg-type]
            for info, content in untar.members(bounded.read):
                if facts is None and info.name != MARKER:
                    raise _not_ours(name)
                _refuse_member(info, name, members)
                data = content()
                if facts is None:
                    facts = _facts(data, name)
                else:
                    members[info.name] = data
            while bounded.read(MIB):
                pass  # to the checksum at the end
    except untar.BadTarError as exc:
        raise _not_ours(name) if facts is None else damaged_archive(name, exc) from exc
    except (EOFError, zlib.error, OSError) as exc:
        raise damaged_archive(name, exc) from exc
    if facts is None:
        raise _not_ours(name)
    return Archive(facts, members)


def _not_ours(name: str) -> EmupmemError:
    return EmupmemError(
        f"{name}: compressed, and no archive of emupmem collect",
        f"if it is a log: zcat {name} | emupmem suggest --from -",
    )


def damaged_archive(name: str, exc: BaseException) -> EmupmemError:
    why = " ".join(str(exc).split())[:100]
    return EmupmemError(f"{name}: the archive is damaged" + (f": {why}" if why else ""), "copy it once more")


def _refuse_member(info: untar.Member, name: str, members: Mapping[str, bytes]) -> None:
    """Raise EmupmemError for a member that `pack` would not have written."""
    shown = ascii(info.name)[1:-1][:80]
    parts = info.name.split("/")
    if not info.plain:
        raise EmupmemError(f"{name}: {shown} is not a regular file")
    if info.name.startswith("/") or ".." in parts or "" in parts or "." in parts or "\0" in info.name:
        raise EmupmemError(f"{name}: a member's name leads elsewhere: {shown}")
    if info.size > LARGEST_FILE:
        raise EmupmemError(f"{name}: {shown} is larger than {LARGEST_FILE // MIB} MiB")
    if len(members) >= MOST_MEMBERS:
        raise EmupmemError(f"{name}: more than {MOST_MEMBERS} members")
    if info.name in members or (members and info.name == MARKER):
        raise EmupmemError(f"{name}: {shown} is in it twice")
    strange = not info.name.isascii() and info.name.startswith((f"{TREE}/sys/", f"{TREE}/proc/"))
    if strange or any(len(p) > 255 for p in parts):
        raise EmupmemError(f"{name}: {shown} does not belong into such an archive")
    if parts[0] not in (MARKER, DOCTOR, TREE, COMMANDS) or (len(parts) > 1) != (parts[0] in (TREE, COMMANDS)):
        raise EmupmemError(f"{name}: {shown} does not belong into such an archive")


def _facts(data: bytes, name: str) -> Mapping[str, Any]:
    """The marker, every value of the type that it has to have."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        raise _not_ours(name) from None
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise _not_ours(name)
    if facts["format"] != FORMAT:
        raise EmupmemError(
            f"{name}: archive format {facts['format']}; this emupmem reads format {FORMAT}",
            "use the emupmem that wrote it, or a newer one",
        )
    problem = _wrong_fact(facts)
    if problem:
        raise EmupmemError(f"{name}: {MARKER} is not as emupmem writes it: {problem}")
    return facts


_REGION: dict[str, Any] = {
    **dict.fromkeys(("name", "provider", "block", "mode", "driver", "claim", "char"), str),
    **dict.fromkeys(("size", "block_size"), int),
    **dict.fromkeys(("start", "numa_node", "dax"), int | None),
}


def _wrong_fact(facts: Mapping[str, Any]) -> str:
    """The first fact that is missing or of another type, empty where all are well."""
    types: dict[str, type] = {
        "root": bool,
        "architecture": str,
        "there": list,
        "modified": dict,
        "banners": dict,
        "nodes": list,
        "regions": list,
        "room": dict,
        "tools": dict,
        "outputs": dict,
        "sourced": dict,
        "unreadable": list,
    }
    for key, kind in types.items():
        if not isinstance(facts.get(key), kind):
            return key
    try:
        [NodeRange(**n) for n in facts["nodes"]]
        if any(
            not isinstance(getattr(Region(**r), k), t) for r in facts["regions"] for k, t in _REGION.items()
        ):
            return "regions"
        numbers = [v for n in facts["nodes"] for v in n.values()]
        numbers += facts["room"].values()
        words = [*facts["there"], *facts["unreadable"], *facts["banners"].values(), *facts["tools"].values()]
        words += [o[k] for o in facts["outputs"].values() for k in ("member", "said")]
        numbers += [o["status"] for o in facts["outputs"].values()]
        times = [v for v in facts["modified"].values() if v is not None]
        sourced_of(facts["sourced"])
    except (TypeError, KeyError, AttributeError, ValueError):
        return "a value"
    if not all(type(n) is int for n in numbers) or not all(isinstance(w, str) for w in words):
        return "a value"
    return "" if all(isinstance(t, int | float) for t in times) else "modified"


def sourced_of(fact: Mapping[str, Any]) -> Sourced | EmupmemError:
    """What sh said there, as the editor knows it. Raises ValueError and its like for other shapes."""
    if "error" in fact:
        return EmupmemError(str(fact["error"]), str(fact.get("hint", "")))
    values = tuple({v: None if row[v] is None else str(row[v]) for v in VARIABLES} for row in fact["values"])
    complaints = tuple((int(i), int(line), str(why)) for i, line, why in fact["complaints"])
    return Sourced(values, {}, complaints, str(fact["failed"]), bool(fact.get("unread")))
