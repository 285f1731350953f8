# SPDX-License-Identifier: Apache-2.0
"""The partitions that proxmox-boot-tool keeps in step: what is on each. They are looked at and never written to.

Most are not mounted. Those are mounted read-only in a mount namespace of their own, which nobody else sees and which
ends with the program that looks. For that moment proxmox-boot-tool, which wants to write, could not mount them.
"""

from __future__ import annotations

import re
from enum import StrEnum

from emupmem.boot.foreign import PROXMOX_ESPS
from emupmem.model import EmupmemError, RootOnly
from emupmem.record import record
from emupmem.system.errors import SUDO
from emupmem.system.host import Host

_CONFIG = "loader/loader.conf"
_ENTRY = re.compile(r"loader/entries/(proxmox-[^/:]+)\.conf")
_SECONDS = 120

# What is mounted rw cannot be mounted read-only once more. The list is read as proxmox-boot-tool reads it: a last line
# without its end does not count, and the UUID may be a part of the line (loop_esp_list, update_esp_func).
_SCRIPT = f"""
h='[0-9a-fA-F]'
cat {PROXMOX_ESPS} | while IFS= read -r uuid; do
  [ "$uuid" ] && echo "uuid $uuid" || continue
  case "$uuid" in */*) continue ;; *$h$h$h$h-$h$h$h$h*) ;; *) continue ;; esac
  device="/dev/disk/by-uuid/$uuid"
  test -e "$device" || continue
  place="$(findmnt --first-only -no TARGET -S "$device")"
  if [ "$place" ]; then
    cd "$place" || {{ echo shut; continue; }}
  else
    mount -t vfat -o ro,nosuid,nodev,noexec "$device" /mnt 2>&1 || {{ echo shut; continue; }}
    cd /mnt
  fi
  echo open
  [ -e EFI/proxmox/grubx64.efi ] && echo grub
  [ -d EFI/proxmox ] && [ -f loader/loader.conf ] && echo ready
  for name in loader/entries/proxmox-*.conf; do [ -f "$name" ] && echo "entry $name"; done
  grep -aHs '' loader/loader.conf loader/entries/proxmox-*.conf
  cd /
  [ "$place" ] || umount /mnt
done
exit 0
"""

LOOK = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT)
"""Tells what is on each partition, a line each; the lines of files with the file's name and a colon before them."""


class PartitionState(StrEnum):
    """What proxmox-boot-tool does with a partition."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    GRUB = "GRUB"
    UNPREPARED = "unprepared"
    EMPTY = "empty"
    SYSTEMD_BOOT = "systemd-boot"


@record
class Partition:
    """One line of the list. `entries` are the texts of proxmox-boot-tool's own entries, by name without .conf."""

    uuid: str
    state: PartitionState
    config: str = ""
    entries: tuple[tuple[str, str], ...] = ()
    why: str = ""


def read_partitions(machine: Host) -> tuple[Partition, ...]:
    """Every partition of the list, in its order. Raises EmupmemError where they cannot be looked at."""
    if not machine.is_root:
        raise RootOnly("the boot entries are on partitions that only root may look at", SUDO)
    done = machine.output(*LOOK, timeout=_SECONDS)
    if done is None or done.status:
        said = f": {done.last_words}" if done is not None else ""
        raise EmupmemError(
            f"the partitions of {PROXMOX_ESPS} cannot be looked at{said}",
            "proxmox-boot-tool status shows whether it can; unshare and mount of util-linux are needed",
        )
    text = done.stdout.decode("utf-8", "surrogateescape")
    parts = re.split(r"^uuid (.*)$", text, flags=re.MULTILINE)[1:]
    return tuple(_partition(uuid, said) for uuid, said in zip(parts[::2], parts[1::2], strict=True))


def _partition(uuid: str, said: str) -> Partition:
    """What is said of one, by the rules of zz-proxmox-boot (update_esp_func)."""
    lines = said.strip("\n").split("\n")
    if "open" not in lines:
        why = next((x for x in lines if x.startswith("mount:")), "it cannot be mounted")
        return (
            Partition(uuid, PartitionState.UNREADABLE, why=why)
            if "shut" in lines
            else Partition(uuid, PartitionState.MISSING)
        )
    if "grub" in lines:
        return Partition(uuid, PartitionState.GRUB)
    if "ready" not in lines:
        return Partition(uuid, PartitionState.UNPREPARED)
    texts = _texts(lines)
    entries = [(found[1], t) for n, t in sorted(texts.items()) if (found := _ENTRY.fullmatch(n))]
    state = PartitionState.SYSTEMD_BOOT if entries else PartitionState.EMPTY
    return Partition(uuid, state, texts.get(_CONFIG, ""), tuple(entries))


def _texts(lines: list[str]) -> dict[str, str]:
    """The files by their names. One whose lines are all gone is there, and empty."""
    texts = {x.removeprefix("entry "): "" for x in lines if x.startswith("entry ")}
    for line in lines:
        name, colon, rest = line.partition(":")
        if colon and (name == _CONFIG or _ENTRY.fullmatch(name)):
            texts[name] = f"{texts.get(name, '')}{rest}\n"
    return texts
