# SPDX-License-Identifier: Apache-2.0
"""Machines whose kernel is a unified image: our words stand in an addon beside the images, which no rebuild touches.

One small file in loader/addons serves every image on its partition, those of new kernels as well, whatever starts
them: systemd-boot or the firmware. Where systemd-boot shows plain entries of this system too, those are changed with
it. What new images take their own words from (/etc/kernel/cmdline) is kept free of ours: they would come twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from emupmem.boot import addon, efi, foreign, owner, signing, systemd_boot
from emupmem.boot.bls import files as bls_files
from emupmem.boot.bls import sources as bls_sources
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls import trial as bls_trial
from emupmem.boot.bls.entries import default_entry_of, trial_chosen
from emupmem.boot.bls.files import BOOT_FOLDERS, TRIAL_ENTRY, entry_files, real_edits
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import Refused
from emupmem.boot.images import UnifiedImage, sorted_images, started_image
from emupmem.boot.loader import Check, Standing, Steps, Wanted, taken_choice
from emupmem.boot.programs import has_program
from emupmem.boot.systemd_boot import SystemdBoot
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError, FileEdit, RootOnly
from emupmem.system.errors import SUDO
from emupmem.system.host import Host

# The editor shows the words of an image and of an entry for a trial, but not those of addons, which come behind.
_EDITOR = (
    "in the boot menu (hold Space at the start) press e, delete {memmap} or, where it is not shown, add -- at the end "
    "(the kernel reads nothing behind it), press Enter"
)
_ELSEWHERE = f"start another system and delete {addon.OURS} from the EFI partition of this one"


class Unified(SystemdBoot):
    """Unified kernel images with systemd-stub 254 or later, and systemd-boot's plain entries beside them."""

    title = "systemd-stub"

    def __init__(self, machine: Host) -> None:
        self.back = _EDITOR if by_systemd_boot(machine) and not efi.secure_boot(machine) else _ELSEWHERE

    # How it stands -------------------------------------------------------------------------------------------

    def standing(self, machine: Host) -> Standing:
        ours, _ = sorted_images(machine)
        if not ours:
            raise _no_images(machine)
        plain = self._plain(machine)
        entries = (*(i.entry for i in ours), *(plain.entries if plain is not None else ()))
        default = self._default(machine, entries)
        items, where = _items(machine, ours, default, plain)
        menu = next((i for i in ours if default is not None and i.ident == default.ids[0]), ours[0])
        return Standing(
            items,
            where,
            menu.name.rpartition("/")[0],
            entries,
            default,
            _trial_words(machine, ours),
            trial_chosen(machine),
            plain.notes if plain is not None else (),
        )

    def _plain(self, machine: Host) -> Standing | None:
        """The plain entries of this system that systemd-boot shows, None where there are none."""
        if not by_systemd_boot(machine) or not entry_files(machine):
            return None
        try:
            return super().standing(machine)
        except EmupmemError:
            return None

    def _default(self, machine: Host, entries: Sequence[BootEntry]) -> BootEntry | None:
        started = started_image(machine).rpartition("/")[2]
        if machine.running and not by_systemd_boot(machine) and started:
            return next((e for e in entries if e.kernel.rpartition("/")[2] == started), entries[0])
        return default_entry_of(machine, entries)

    def sources(self, machine: Host) -> tuple[str, ...]:
        there = [n for n in _addon_files(machine) if machine.exists(n)]
        return (*there, *super().sources(machine))

    def new_kernels_take(self, machine: Host, now: Standing) -> str:
        there = next((n for n in _addon_files(machine) if machine.exists(n)), "")
        source = super().new_kernels_take(machine, now)
        return f"{source}, and {there}" if there else source

    def files(self, machine: Host) -> tuple[str, ...]:
        return (*super().files(machine), *_addon_files(machine))

    # Whether it may be changed -------------------------------------------------------------------------------

    def refuse(self, machine: Host) -> None:
        ours, others = sorted_images(machine)
        if not ours and not machine.is_root:
            addon.refuse_without_tools(machine)
            return  # root will see
        default = self.standing(machine).default
        chosen = [i for i in ours if default is not None and i.ident == default.ids[0]]
        for image in chosen or ours[:1]:
            if not image.reads_addons:
                raise Refused(foreign.built_in_line(image.name, _why_old(image), *_rebuilding(machine)))
        for image in others:
            if any(image.partition == i.partition for i in ours):
                raise Refused(foreign.shared_images(image.name, (chosen or ours)[0].name))
        try:
            if machine.is_root:
                signing.signing_key(machine)
        except EmupmemError as exc:
            raise Refused(
                foreign.built_in_line((chosen or ours)[0].name, exc.message, *_rebuilding(machine))
            ) from exc
        addon.refuse_without_tools(machine)

    def checks(self, machine: Host) -> dict[str, Check]:
        return {**super().checks(machine), "images": _warn_of_images}

    def refuse_trial(self, machine: Host) -> None:
        if not by_systemd_boot(machine):
            raise EmupmemError(
                "a trial needs systemd-boot: nothing here forgets a choice for one start",
                "apply without --trial",
            )
        default = self.standing(machine).default
        if default is None or not default.kernel.lower().endswith(".efi"):
            super().refuse_trial(machine)
            return
        systemd_boot.refuse_without_one_shot(machine)
        if efi.secure_boot(machine):
            raise EmupmemError(
                "with Secure Boot on, a unified kernel image takes no words from a boot entry: nothing can be tried",
                "apply without --trial",
            )

    # What a change is ----------------------------------------------------------------------------------------

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        ours, _ = sorted_images(machine)
        fixed = _fixed(ours)
        built = bool(ours) and bool(wanted.items) and all(_has_built(i, wanted.items) for i in ours)
        if wanted.items and fixed and not built:
            name, items = fixed[0]
            raise EmupmemError(
                f"{name} has memmap={','.join(items)} built into it, and an addon can only add to that",
                f"{_without(machine, name)}; then try again",
            )
        addons = [
            e
            for place in _addon_files(machine)
            for e in _addon_edits(
                machine, ours, place, dataclasses.replace(wanted, items=()) if built else wanted
            )
        ]
        steps = super().steps(machine, wanted)
        notes = [
            f"{name} still has memmap={','.join(items)} built into it: {_without(machine, name)}"
            for name, items in fixed
            if not wanted.items
        ]
        if notes and not (addons or steps.changed):
            raise EmupmemError(
                f"{fixed[0][0]} has memmap={','.join(fixed[0][1])} built into it",
                _without(machine, fixed[0][0]),
            )
        gone = [e.name for e in addons if e.after is None]
        folders = tuple(
            f for n in gone for f in (n.rpartition("/")[0], n.removesuffix(f"/{addon.OURS}") + "/loader")
        )
        return dataclasses.replace(
            steps, edits=(*addons, *steps.edits), notes=(*steps.notes, *notes), folders=folders
        )

    def new_kernels(self, machine: Host, wanted: Wanted) -> list[FileEdit]:
        ours, _ = sorted_images(machine)
        if wanted.items and not _fixed(ours) and _makes_images(machine, self._plain(machine)):
            return bls_sources.bare_source(machine, self._model(machine, ours).file.line)
        if self._plain(machine) is not None:
            return super().new_kernels(machine, wanted)
        return bls_sources.source_edits(machine, None, wanted.items, wanted.add, wanted.drop)

    def _model(self, machine: Host, ours: Sequence[UnifiedImage]) -> UnifiedImage:
        """The image that boots by default, else the first one."""
        default = self.standing(machine).default
        return next((i for i in ours if default is not None and i.ident == default.ids[0]), ours[0])

    def judged(self, standing: Standing, wanted: Wanted) -> Standing:
        """What is built into an image stays, and was told: the rest is judged without it."""
        if wanted.items:
            return standing
        entries = tuple(
            dataclasses.replace(e, words=tuple(bls_text.foreign_words(e.command_line)))
            if e.kernel.lower().endswith(".efi")
            else e
            for e in standing.entries
        )
        return dataclasses.replace(standing, entries=entries)

    def prove(self, machine: Host, before: Standing, steps: Steps) -> int:
        count = super().prove(machine, before, steps)
        left = [
            n for n in _addon_files(machine) if parse_command_line(addon.addon_line(machine, n)).reservations
        ]
        if left and not steps.wanted.items:
            raise EmupmemError(f"{left[0]} still reserves memory")
        return count

    # Trials --------------------------------------------------------------------------------------------------

    def trial_steps(self, machine: Host, now: Standing, wanted: Wanted) -> Steps:
        """A plain entry that starts the same image with all its words and the tried ones.

        Without Secure Boot systemd-stub takes them in the place of those in the image (settle_command_line in
        src/boot/stub.c): no copy of the image is needed, and no room for one.
        """
        ours, _ = sorted_images(machine)
        default = now.default
        image = next((i for i in ours if default is not None and i.ident == default.ids[0]), None)
        if image is None:
            return super().trial_steps(machine, now, wanted)
        name = f"{image.partition}/loader/entries/{TRIAL_ENTRY}"
        there = parse_command_line(image.line).words
        words = [w for w in wanted.trial if w.startswith("memmap=") or w not in there]
        line = " ".join([image.file.line, *words])
        text = bls_trial.trial_entry_of(wanted.trial, f"efi {image.name.removeprefix(image.partition)}", line)
        edits = [
            *bls_sources.kept_line(machine, image.file.line),
            FileEdit(name, machine.read(name), text.encode("utf-8", "surrogateescape")),
        ]
        other = "" if now.chosen else efi.one_shot(machine)
        return Steps(wanted, real_edits(edits), notes=taken_choice(other))


def starts_images(machine: Host) -> bool:
    """Whether images of this system are here that start it, or may at the next start."""
    if machine.running and (
        owner.by_grub(machine) or not (by_systemd_boot(machine) or owner.by_image(machine))
    ):
        return False
    if machine.running and not machine.is_root and not bls_files.unified_images(machine):
        return owner.by_image(machine)  # the partition is closed to us
    try:
        return bool(sorted_images(machine)[0])
    except EmupmemError:
        return False


def by_systemd_boot(machine: Host) -> bool:
    """Whether systemd-boot shows the menu."""
    if not machine.running:
        return owner.has_systemd_boot(machine)
    return "systemd-boot" in efi.loader_name(machine).lower()


def _no_images(machine: Host) -> EmupmemError:
    if not machine.is_root:
        return RootOnly("unified kernel images are shown to root only", SUDO)
    return EmupmemError(
        "there is no unified kernel image that starts this system",
        "mount the EFI system partition if it is not mounted (bootctl status names it)",
    )


def _warn_of_images(machine: Host) -> tuple[str, ...]:
    """Images that would start without the reservation, and what cannot be seen."""
    try:
        ours, _ = sorted_images(machine)
    except EmupmemError:
        return ()
    old = [f"{i.name} ({_why_old(i)}) will start without it" for i in ours if not i.reads_addons]
    if efi.secure_boot(machine) is None:
        old.append(
            "whether Secure Boot is on cannot be seen: with it, an addon that is not signed is passed over"
        )
    return tuple(old)


def _why_old(image: UnifiedImage) -> str:
    made = image.file.maker or "an unknown stub"
    return f"made with {made}; addons to its command line need systemd-stub {addon.SINCE}"


# Our addon ---------------------------------------------------------------------------------------------------


def _addon_files(machine: Host) -> list[str]:
    """Our addon on every partition where it may be, one name for each file."""
    found = {machine.real(f"{f}/{addon.OURS}"): f"{f}/{addon.OURS}" for f in reversed(BOOT_FOLDERS)}
    return list(reversed(found.values()))


def _addon_edits(machine: Host, ours: Sequence[UnifiedImage], name: str, wanted: Wanted) -> list[FileEdit]:
    """What makes our addon on one partition as wanted: none where no image of this system is on it."""
    here = any(machine.real(f"{i.partition}/{addon.OURS}") == machine.real(name) for i in ours)
    if not here:
        wanted = Wanted(drop=wanted.drop)
    before, file = machine.read(name), machine.pe_file(name)
    line = addon.addon_line(machine, name)
    after = bls_text.reworked(line, wanted.items, wanted.add if wanted.items else (), wanted.drop)
    bls_text.prove_words(line, after, wanted.items, wanted.add if wanted.items else (), wanted.drop)
    after = after.strip()
    if not after:
        return [FileEdit(name, before, None)] if before is not None else []
    if after == line and (file is None or file.signed or not efi.secure_boot(machine)):
        return []
    return [FileEdit(name, before, addon.made_addon(machine, after, signing.signing_key(machine)))]


def _fixed(ours: Sequence[UnifiedImage]) -> list[tuple[str, tuple[str, ...]]]:
    """(file, items) of all reservations that are not in our addon."""
    found = [f for i in ours for f in i.fixed(f"{i.partition}/{addon.OURS}")]
    return list(dict.fromkeys(found))


def _has_built(image: UnifiedImage, items: tuple[str, ...]) -> bool:
    there = [i for _, x in image.fixed(f"{image.partition}/{addon.OURS}") for i in x]
    return tuple(there) == items


def _items(
    machine: Host, ours: Sequence[UnifiedImage], default: BootEntry | None, plain: Standing | None
) -> tuple[tuple[str, ...], str]:
    """Our items, and where they stand: in our addon, in what new plain entries are made of, in the image itself."""
    for name in _addon_files(machine):
        items = tuple(i.text for i in parse_command_line(addon.addon_line(machine, name)).reservations)
        if items:
            return items, name
    if plain is not None and not _makes_images(machine, plain):
        return plain.items, plain.where
    for image in ours:
        if default is not None and image.ident == default.ids[0]:
            built = [i for _, x in image.fixed("") for i in x]
            return (tuple(built), image.name) if built else ((), f"{image.partition}/{addon.OURS}")
    return (plain.items, plain.where) if plain is not None else ((), f"{ours[0].partition}/{addon.OURS}")


# Where images come from --------------------------------------------------------------------------------------


def _makes_images(machine: Host, plain: Standing | None) -> bool:
    """Whether new kernels become images."""
    by_preset = bls_sources.mkinitcpio_makes_images(machine)
    return plain is None or by_preset or bls_sources.kernel_install_layout(machine) == "uki"


def _rebuilding(machine: Host) -> tuple[str, str]:
    """Where an image takes its words from when it is made anew, and what makes it."""
    if has_program(machine, "mkinitcpio"):
        folder = any(n.endswith(".conf") for n in machine.names(bls_sources.MKINITCPIO_D))
        there = machine.exists(bls_sources.KERNEL_CMDLINE) or not folder
        where = bls_sources.KERNEL_CMDLINE if there else f"{bls_sources.MKINITCPIO_D}/emupmem.conf"
        return where, "sudo mkinitcpio -P"
    if has_program(machine, "kernel-install"):
        return (
            bls_sources.KERNEL_CMDLINE,
            "sudo kernel-install add-all (add, with a version, before systemd 256)",
        )
    if has_program(machine, "dracut"):
        return "kernel_cmdline= in /etc/dracut.conf.d/cmdline.conf", "sudo dracut --regenerate-all --force"
    return bls_sources.KERNEL_CMDLINE, "make the image anew"


def _without(machine: Host, name: str) -> str:
    """How what is fixed somewhere is taken out."""
    if name.lower().endswith(".addon.efi"):
        return f"sudo rm {name}"
    where, run = _rebuilding(machine)
    return f"see that {where} has no memmap= any more, and make it anew ({run})"


def _trial_words(machine: Host, ours: Sequence[UnifiedImage]) -> tuple[str, ...]:
    """The words of the trial's start: those of its entry, and of the addons of the image that it starts."""
    file = bls_files.trial_file(machine)
    text = machine.text(file) if file else ""
    words = parse_command_line(bls_text.options(text)).words
    path = bls_text.value(text, "efi")
    image = next((i for i in ours if path and i.name == i.partition + path), None)
    if image is None:
        return words
    own = parse_command_line(image.file.line).words
    there = parse_command_line(image.line).words
    return (*there, *words[len(own) :]) if words[: len(own)] == own else words
