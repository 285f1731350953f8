# SPDX-License-Identifier: Apache-2.0
"""What is asked of a namespace, and whether one that is there already is like that. Pure."""

from __future__ import annotations

import re

from emupmem.model import EmupmemError
from emupmem.nvdimm.view import MODES, Namespace, View, real_first
from emupmem.record import record
from emupmem.units import human, parse_size

MAPPED = ("fsdax", "devdax")
"""The modes that have a page map, and so --map and --align."""

LONGEST_NAME = 63
"""Bytes of a name in a label (NSLABEL_NAME_LEN of the kernel, which ends it with a NUL)."""

_OWN_NAMES = re.compile(r"(namespace|pmem|dax|region|nmem)\d.*", re.DOTALL)
"""How the kernel names what it numbers."""


@record
class NamespaceWish:
    """Sizes in bytes. `size` None: all that is free, `map` and `align` empty and 0: as ndctl chooses.

    `region` empty: the first with labels and room. `name` is one of its own, kept in its label.
    """

    region: str = ""
    size: int | None = None
    mode: str = "fsdax"
    map: str = ""
    align: int = 0
    name: str = ""


def check_options(mode: str, map_: str, align: str, name: str = "") -> int:
    """The alignment in bytes (0 where none is asked). Raises EmupmemError for options that exclude each other."""
    if mode not in MODES:
        raise EmupmemError(f"there is no mode {mode}", f"there are {', '.join(MODES)}")
    for option, value in (("--map", map_), ("--align", align)):
        if value and mode not in MAPPED:
            raise EmupmemError(f"{option} belongs to fsdax and devdax", f"{mode} has no page map")
    if map_ not in ("", "mem", "dev"):
        raise EmupmemError(
            f"--map {map_} is not known", "the page map is kept in RAM (mem) or on the device (dev)"
        )
    if align and not parse_size(align, "alignment"):
        raise EmupmemError("an alignment of 0 is none", "leave --align out")
    if name:
        _check_name(name)
    return parse_size(align, "alignment") if align else 0


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", name) or len(name) > LONGEST_NAME:
        raise EmupmemError(
            f"{name!r} cannot be the name of a namespace",
            f"letters, digits and _ . : - can be in it, at most {LONGEST_NAME} of them",
        )
    if _OWN_NAMES.fullmatch(name):
        raise EmupmemError(f"{name} looks like a name that the kernel gives", "choose another one")


def namespace_like(view: View, wish: NamespaceWish) -> Namespace | None:
    """The namespace that is as asked already, None where one is to be made.

    Without a name it is any in the regions that `create` would choose from. Raises EmupmemError where the name
    belongs to one that is not as asked: it holds what somebody may need.
    """
    all_ = [(r, n) for r in real_first(view.regions) for n in r.namespaces]
    if wish.name:
        named = next((n for _, n in all_ if n.alt_name == wish.name), None)
        if named is not None and (wrong := _differences(named, wish)):
            raise EmupmemError(
                f"{wish.name} is there, {named.name}, but {' and '.join(wrong)}",
                f"sudo emupmem nvdimm destroy {wish.name} if nothing of it is needed; or choose another name",
            )
        return named
    there = (n for r, n in all_ if r.enabled and (wish.region or r.labelled))
    return next((n for n in there if not _differences(n, wish)), None)


def _differences(one: Namespace, wish: NamespaceWish) -> list[str]:
    """What of a namespace is not as asked, in words."""
    if not one.enabled:
        return ["it is disabled"]
    found = [f"it is on {one.region}"] if wish.region not in ("", one.region) else []
    found += [f"its mode is {one.mode}"] if one.mode != wish.mode else []
    found += [f"it has {human(one.raw_size)}"] if wish.size not in (None, one.raw_size) else []
    found += [f"its page map is in {one.map or 'none'}"] if wish.map not in ("", one.map) else []
    return found + ([f"it is aligned to {human(one.align)}"] if wish.align not in (0, one.align) else [])
