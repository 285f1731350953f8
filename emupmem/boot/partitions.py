# SPDX-License-Identifier: Apache-2.0
"""The partitions that proxmox-boot-tool keeps in step: what is on each. They are looked at and never written to.

Most are not mounted. Those are mounted read-only in a mount namespace of their own, which nobody else sees and which
ends with the program that looks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from emupmem.boot.foreign import PROXMOX_ESPS
from emupmem.device.blocks import mounts
from emupmem.model import EmupmemError, RootOnly
from emupmem.record import record
from emupmem.system.errors import SUDO
from emupmem.system.host import Host

_UUID = re.compile(r"[0-9a-fA-F]{4}-[0-9a-fA-F]{4}")
_DEVICE = "/dev/disk/by-uuid/{}"
LOOK_SECONDS = 120
_CONFIG = "loader/loader.conf"
_ENTRY = re.compile(r"loader/entries/(proxmox-[^/:]+)\.conf")

LOOK = """
for device; do
  echo "device $device"
  mount -t vfat -o ro,nosuid,nodev,noexec "$device" /mnt 2>&1 || { echo shut; continue; }
  cd /mnt
  [ -e EFI/proxmox/grubx64.efi ] && echo grub
  [ -d EFI/proxmox ] && echo folder
  for name in loader/entries/proxmox-*.conf; do [ -f "$name" ] && echo "entry $name"; done
  grep -aHs '' loader/loader.conf loader/entries/proxmox-*.conf
  cd /
  umount /mnt
done
"""
"""For sh: what is on each device, a line each; those of files have the file's name and a colon before them."""


class Kind(StrEnum):
    """What proxmox-boot-tool does with a partition."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    GRUB = "GRUB"
    UNPREPARED = "unprepared"
    SYSTEMD_BOOT = "systemd-boot"


@record
class Partition:
    """One line of the list. `entries` are the texts of proxmox-boot-tool's own entries, by name without .conf."""

    uuid: str
    kind: Kind
    config: str = ""
    entries: tuple[tuple[str, str], ...] = ()
    why: str = ""


@record
class _Seen:
    """What is on a partition, as far as it counts: `texts` by the name of the file."""

    grub: bool
    folder: bool
    texts: dict[str, str]
    shut: str = ""


def read_partitions(machine: Host) -> tuple[Partition, ...]:
    """Every partition of the list, in its order. Raises EmupmemError where they cannot be looked at."""
    if not machine.is_root:
        raise RootOnly("the boot entries are on partitions that only root may look at", SUDO)
    # One that is mounted cannot be mounted read-only once more.
    seen = {d: _in_folder(machine, folder) for d, folder in _folders(machine).items()}
    seen |= _unmounted(machine, shut_devices(machine))
    return tuple(_partition(u, seen.get(_DEVICE.format(u))) for u in _uuids(machine))


def devices(machine: Host) -> tuple[str, ...]:
    """The devices of the list, whether they are there or not."""
    return tuple(_DEVICE.format(u) for u in _uuids(machine) if _UUID.fullmatch(u))


def shut_devices(machine: Host) -> tuple[str, ...]:
    """Those that are there and mounted nowhere."""
    folders = _folders(machine)
    return tuple(d for d in devices(machine) if d not in folders and machine.exists(d))


def _folders(machine: Host) -> dict[str, str]:
    """Where devices are mounted as a whole."""
    places = {machine.real(d): d for d in devices(machine)}
    return {places[m.source]: m.dir for m in mounts(machine) if m.source in places and m.root == "/"}


def look_command(devices: Sequence[str]) -> tuple[str, ...]:
    """What looks at devices that are not mounted."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", LOOK, "sh", *devices)


def _uuids(machine: Host) -> list[str]:
    return [line for line in machine.peek(PROXMOX_ESPS).split("\n") if line]


def _partition(uuid: str, seen: _Seen | None) -> Partition:
    """By the rules of zz-proxmox-boot (update_esp_func)."""
    if seen is None:
        return Partition(uuid, Kind.MISSING)
    if seen.shut:
        return Partition(uuid, Kind.UNREADABLE, why=seen.shut)
    if seen.grub:
        return Partition(uuid, Kind.GRUB)
    if not seen.folder or _CONFIG not in seen.texts:
        return Partition(uuid, Kind.UNPREPARED)
    entries = [(found[1], t) for n, t in sorted(seen.texts.items()) if (found := _ENTRY.fullmatch(n))]
    return Partition(uuid, Kind.SYSTEMD_BOOT, seen.texts[_CONFIG], tuple(entries))


def _in_folder(machine: Host, folder: str) -> _Seen:
    entries = [f"loader/entries/{n}" for n in machine.names(f"{folder}/loader/entries")]
    names = [n for n in (_CONFIG, *entries) if n == _CONFIG or _ENTRY.fullmatch(n)]
    texts = {n: machine.text(f"{folder}/{n}") for n in names if machine.exists(f"{folder}/{n}")}
    grub = machine.exists(f"{folder}/EFI/proxmox/grubx64.efi")
    return _Seen(grub, machine.exists(f"{folder}/EFI/proxmox"), texts)


def _unmounted(machine: Host, devices: Sequence[str]) -> dict[str, _Seen]:
    if not devices:
        return {}
    done = machine.output(*look_command(devices), timeout=LOOK_SECONDS)
    text = done.stdout.decode("utf-8", "surrogateescape") if done is not None else ""
    parts = re.split(r"^device (.*)$", text, flags=re.MULTILINE)[1:]
    if done is None or parts[::2] != list(devices):
        said = f": {done.last_words}" if done is not None else ""
        raise EmupmemError(
            f"the partitions of {PROXMOX_ESPS} cannot be looked at{said}",
            f"unshare --mount mount -o ro {devices[0]} /mnt says why",
        )
    return {device: _read(said) for device, said in zip(parts[::2], parts[1::2], strict=True)}


def _read(said: str) -> _Seen:
    """What LOOK prints of one device. A file whose lines are all gone is there, and empty."""
    lines = said.strip("\n").split("\n")
    if lines[-1] == "shut":
        return _Seen(
            False, False, {}, next((x for x in lines if x.startswith("mount:")), "it cannot be mounted")
        )
    texts = {x.removeprefix("entry "): "" for x in lines if x.startswith("entry ")}
    for line in lines:
        name, colon, rest = line.partition(":")
        if colon and (name == _CONFIG or _ENTRY.fullmatch(name)):
            texts[name] = f"{texts.get(name, '')}{rest}\n"
    return _Seen("grub" in lines, "folder" in lines, texts)
