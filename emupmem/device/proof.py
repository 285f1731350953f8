# SPDX-License-Identifier: Apache-2.0
"""What is to be seen of a mounted device, and the steps of the ladder that it makes."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Sequence

from emupmem.device import dax, installed, keep, unit
from emupmem.device.blocks import FILE_SYSTEMS, Mounted, Pmem, devices, mounts, signature
from emupmem.device.nature import ASYNCHRONOUS, VOLATILE, nature
from emupmem.model import Check, EmupmemError
from emupmem.record import record
from emupmem.system.host import Host
from emupmem.system.machine import Machine

NOT_BACK = "what it holds was not brought back from its image in this boot, which is never saved over"


def explained(name: str, broken: str) -> Check:
    return Check(name, "skipped", "", f"explained by {broken}", explained_by=broken)


def look_at_mounts(machine: Host, wanted: Sequence[unit.BootMount]) -> tuple[SeenMount, ...]:
    """What verify judges: each mount that the boot unit asks for, and each of our devices mounted besides."""
    all_mounts = mounts(machine)
    ours = [d for d in devices(machine) if d.item is not None]
    seen = []
    program = installed.present_program(machine) if any(m.keep for m in wanted) else ""
    broken = installed.program_problem(machine, program) if program else ""
    for mount in wanted:
        range_ = (mount.start, mount.size)
        device = next((d for d in ours if d.item and (d.item.start, d.item.size) == range_), None)
        one = see_mount(machine, device, mount.dir, mount.fs, all_mounts, True)
        missed = machine.peek(keep.missed_note(mount)) if mount.keep else ""
        unsaved = broken if mount.keep else ""
        if (
            mount.keep
            and one.at == mount.dir
            and isinstance(machine, Machine)
            and not keep.belongs(machine, mount)
        ):
            unsaved = NOT_BACK
        seen.append(dataclasses.replace(one, keep=mount.keep, missed=missed, unsaved=unsaved))
    asked = {s.device for s in seen}
    for device in ours:
        at = [m for m in all_mounts if m.number == device.number and m.root == "/"]
        if device.dev not in asked and at:
            seen.append(see_mount(machine, device, at[0].dir, "", all_mounts, False))
    return tuple(seen)


def see_mount(
    machine: Host,
    device: Pmem | None,
    folder: str,
    fs: str,
    all_mounts: Iterable[Mounted],
    at_boot: bool,
) -> SeenMount:
    if device is None:
        return SeenMount("", folder, fs, None, "", (), at_boot=at_boot)
    own = [m for m in all_mounts if m.number == device.number]
    here = next((m for m in own if m.dir == folder and m.root == "/"), None)
    if here is None:
        found: str | None = own[0].fs if own else None
        if found is None and machine.is_root and isinstance(machine, Machine):
            try:
                found = signature(machine, device.dev)
            except EmupmemError:
                found = None
        return SeenMount(device.dev, folder, fs, found, own[0].dir if own else "", (), at_boot=at_boot)
    # To prove it writes a file there; of an archive only what was seen counts.
    proof = (
        dax.prove_dax(str(machine.path(folder)))
        if isinstance(machine, Machine)
        else dax.DaxProof(why="not tried here")
    )
    return SeenMount(
        device.dev,
        folder,
        fs,
        here.fs,
        folder,
        here.options,
        proof.dax_file,
        proof.map_sync,
        proof.faults,
        proof.huge_pages,
        _no_huge_pages(machine),
        proof.aligned,
        proof.why,
        at_boot,
        fate=nature(machine, device.provider, device.item is not None, device.domain),
        asynchronous=device.provider == ASYNCHRONOUS,
    )


def _no_huge_pages(machine: Host) -> str:
    """Why this kernel cannot map files by 2 MiB at all, empty where it can or that is not known."""
    name, config = machine.kernel_config(machine.peek("/proc/sys/kernel/osrelease"))
    if name and not re.search(r"^CONFIG_FS_DAX_PMD=y", config, re.MULTILINE):
        return f"this kernel is built without CONFIG_FS_DAX_PMD ({name})"
    return ""


# From the device to a folder that a program can use -------------------------------------------------

MOUNT_RUNGS = ("filesystem", "mounted", "dax-file", "map-sync", "huge-pages")


def mount_rungs(mounts: Sequence[SeenMount]) -> tuple[Check, ...]:
    """The five rungs above the device; on each the worst of the mounts speaks, and a good one for all."""
    judges = (_filesystem, _mounted, _dax_file, _map_sync, _huge_pages)
    checks: list[Check] = []
    broken = ""
    for name, judge in zip(MOUNT_RUNGS, judges, strict=True):
        if broken:
            checks.append(explained(name, broken))
            continue
        found = [judge(m) for m in mounts]
        worst = next((c for status in ("fail", "skipped") for c in found if c.status == status), None)
        checks.append(worst or Check(name, "ok", found[0].expected, "; ".join(c.found for c in found)))
        broken = name if checks[-1].status == "fail" else ""
    return tuple(checks)


def left_over(mount: SeenMount) -> Check:
    found = f"{mount.dir} is asked for at every boot, and nothing is reserved for it"
    return Check("filesystem", "skipped", "", found, "sudo emupmem remove deletes it")


def _again(mount: SeenMount, force: str = "") -> str:
    fs = f" --fs {mount.wanted}" if mount.wanted not in ("", FILE_SYSTEMS[0]) else ""
    return f"sudo emupmem mount {mount.device} {shlex.quote(mount.dir)}{fs}{force}"


def _filesystem(mount: SeenMount) -> Check:
    wanted = mount.wanted or "a file system"
    if not mount.device:
        found = f"the device that {mount.dir} is for is not there"
        return Check("filesystem", "fail", wanted, found, "sudo emupmem apply --mount … plans it again")
    if mount.fs is None:
        return Check("filesystem", "skipped", wanted, f"what {mount.device} holds is shown to root only")
    if not mount.fs:
        return Check("filesystem", "fail", wanted, f"{mount.device} is blank", _why_not(mount))
    if mount.wanted and mount.fs != mount.wanted:
        hint = f"{_again(mount, ' --force')} makes {wanted} (and destroys what is there)"
        if mount.at:
            hint = f"sudo emupmem umount {mount.at} first; {hint}"
        return Check("filesystem", "fail", wanted, f"{mount.device} holds {mount.fs}", hint)
    return Check("filesystem", "ok", wanted, f"{mount.fs} on {mount.device}")


def _why_not(mount: SeenMount) -> str:
    if mount.at_boot:
        return f"journalctl -b -u emupmem.service shows why; {_again(mount)} does it now"
    return _again(mount)


def _mounted(mount: SeenMount) -> Check:
    expected = f"{mount.device} at {mount.dir} with DAX"
    if not mount.at:
        return Check("mounted", "fail", expected, f"{mount.device} is not mounted", _why_not(mount))
    if mount.at != mount.dir:
        hint = f"sudo emupmem umount {mount.at}, then {_again(mount)}"
        return Check("mounted", "fail", expected, f"{mount.device} is mounted at {mount.at}", hint)
    if "dax=always" not in mount.options and "dax" not in mount.options:
        found = f"{mount.dir} without dax: {','.join(mount.options)}"
        return Check(
            "mounted", "fail", expected, found, f"sudo emupmem umount {mount.dir}, then {_again(mount)}"
        )
    option = "dax=always" if "dax=always" in mount.options else "dax"
    boot = ", at every boot" if mount.at_boot else ""
    fate = f"saved to {mount.keep} at an orderly shutdown only" if mount.keep else mount.fate
    if mount.unsaved:
        found = f"the next shutdown will not save {mount.dir}: {mount.unsaved}"
        anew = f"with {mount.keep} moved away, {_again(mount)} --at-boot --keep {shlex.quote(mount.keep)} begins anew"
        repair = anew if mount.unsaved == NOT_BACK else installed.REPAIR
        hint = f"{repair}; sudo emupmem save FILE {shlex.quote(mount.dir)} saves it now"
        return Check("mounted", "fail", expected, found, hint)
    told = f"; {mount.missed}" if mount.missed else ""
    return Check("mounted", "ok", expected, f"{mount.dir} with {option}{boot} · {fate}{told}")


def _dax_file(mount: SeenMount) -> Check:
    expected = "files are mapped directly (statx: STATX_ATTR_DAX)"
    if mount.dax_file is None:
        return Check("dax-file", "skipped", expected, mount.why or "this kernel cannot say (before 5.8)")
    if not mount.dax_file:
        found = f"a new file in {mount.dir} has no DAX, whatever the option says"
        hint = "sudo dmesg | grep -i dax shows why: block size, reflink, or the device"
        return Check("dax-file", "fail", expected, found, hint)
    return Check("dax-file", "ok", expected, "a new file has DAX (statx)")


def _map_sync(mount: SeenMount) -> Check:
    expected = "MAP_SYNC mappings"
    if mount.map_sync is None:
        return Check("map-sync", "skipped", expected, mount.why or "could not be tried")
    if not mount.map_sync and mount.asynchronous:
        found = "virtio-pmem has none: what a program wrote is safe after msync or fsync, which the host carries out"
        return Check("map-sync", "skipped", expected, found)
    if not mount.map_sync:
        hint = (
            "the device is not synchronous, or the kernel is older than 4.15; PMEM_IS_PMEM_FORCE=1 for tests"
        )
        return Check("map-sync", "fail", expected, "the kernel refuses MAP_SYNC", hint)
    return Check("map-sync", "ok", expected, "the kernel maps with MAP_SYNC")


def _huge_pages(mount: SeenMount) -> Check:
    expected = "a fault maps 2 MiB"
    if mount.faults is None:
        return Check("huge-pages", "skipped", expected, mount.why or "could not be tried")
    counted = f"{mount.faults} faults for 4 MiB"
    if mount.huge:
        return Check("huge-pages", "ok", expected, f"{counted}: 2 MiB each")
    if mount.no_huge:
        return Check("huge-pages", "skipped", expected, f"not supported: {mount.no_huge}; {counted}")
    if not mount.aligned:
        hint = "programs must choose an address that is a multiple of 2 MiB by themselves"
        return Check("huge-pages", "fail", expected, f"{counted}; the kernel chose a crooked address", hint)
    hint = (
        f"the file system is not laid out for 2 MiB, or too full for it: sudo emupmem umount {mount.dir}, then "
        f"{_again(mount, ' --force')} makes a new one (and destroys this one)"
    )
    return Check("huge-pages", "fail", expected, f"{counted}: 4 KiB each", hint)


@record
class SeenMount:
    """A mount that the boot unit asks for (`at_boot`) or that is there besides; None: could not be seen.

    `fs` is what the device holds (empty: blank), `wanted` what was asked (empty: anything), `at`
    where it is mounted, `keep` the image that its content is kept in. `faults` is what writing to 4 MiB
    took, `huge` what that means, `no_huge` why the kernel has no huge pages for files at all, `why` why a
    proof could not be made, `fate` what keeps the content, `asynchronous` that the device never has MAP_SYNC.
    `missed` is what to tell of the last shutdown, which did not save, `unsaved` why the next one will not.
    """

    device: str
    dir: str
    wanted: str
    fs: str | None
    at: str
    options: tuple[str, ...]
    dax_file: bool | None = None
    map_sync: bool | None = None
    faults: int | None = None
    huge: bool | None = None
    no_huge: str = ""
    aligned: bool = True
    why: str = ""
    at_boot: bool = False
    keep: str = ""
    fate: str = VOLATILE
    asynchronous: bool = False
    missed: str = ""
    unsaved: str = ""
