# SPDX-License-Identifier: Apache-2.0
"""Where GRUB's files lie: its menu, its environment block, the program that makes the menu."""

from __future__ import annotations

import contextlib
import re

from emupmem.boot.grub import menu as grub_menu
from emupmem.boot.programs import has_program
from emupmem.model import Command, EmupmemError
from emupmem.system import log
from emupmem.system.backups import is_aside, read_aside
from emupmem.system.distribution import families, install_hint
from emupmem.system.errors import write_hint
from emupmem.system.files import fresh_name, sync_file, sync_folder, write_like
from emupmem.system.host import Host
from emupmem.system.machine import Machine
from emupmem.system.sysfs import peek_file

GRUB_DEFAULT = "/etc/default/grub"
GRUB_DROPINS = "/etc/default/grub.d"
GRUB_CFGS = ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg")
GRUBENVS = ("/boot/grub2/grubenv", "/boot/grub/grubenv")
ESP_FOLDERS = "/boot/efi/EFI"
ESP_MARKS = ("/etc/grub2-efi.cfg", "/boot/grub2/grubenv")
"""Links of Red Hat's packages: where they lead into the EFI system partition, the menu is there too."""

GENERATORS = ("update-grub2", "update-grub", "grub2-mkconfig", "grub-mkconfig")
GENERATOR_OF = {
    **dict.fromkeys(("fedora", "rhel", "centos", "suse", "opensuse", "mageia"), "grub2-mkconfig"),
    **dict.fromkeys(("arch", "gentoo", "void", "slackware"), "grub-mkconfig"),
    **dict.fromkeys(("debian", "ubuntu"), "update-grub2"),
}
"""What a family of distributions calls it, by the words of ID and ID_LIKE."""


def grub_cfg(machine: Host) -> str:
    """Where the generated menu lies (the first that exists, else Debian's place).

    Red Hat's family up to 8 has it in the EFI system partition, where others have a stub that leads to it.
    """
    here = next((name for name in GRUB_CFGS if machine.exists(name)), "")
    # A menu of BIOS times may still be there: what UEFI started was not that one.
    own = _esp_menu(machine) if not here or machine.exists("/sys/firmware/efi") else ""
    return own or here or GRUB_CFGS[0]


def _esp_menu(machine: Host) -> str:
    """The menu in the EFI system partition that belongs to this system, empty where there is none."""
    names = [f"{ESP_FOLDERS}/{n}/grub.cfg" for n in machine.names(ESP_FOLDERS)]
    full = [n for n in names if (text := machine.peek(n)) and not grub_menu.is_stub(text)]
    if not full:
        return ""
    folders = {machine.real(m).rpartition("/")[0] for m in ESP_MARKS if machine.exists(m)}
    own = [n for n in full if machine.real(n).rpartition("/")[0] in folders]
    alone = len(full) == 1 and not any(machine.exists(n) for n in GRUB_CFGS)
    return next(iter(own or (full if alone else [])), "")


def grub_cfgs(machine: Host) -> list[str]:
    """The menus that lie here, one name for each file."""
    names = [n for n in (*GRUB_CFGS, grub_cfg(machine)) if machine.exists(n)]
    return list({machine.real(name): name for name in reversed(names)}.values())


def grubenv_name(machine: Host) -> str:
    """Where GRUB's environment block lies: next to the menu, else in one of its usual places."""
    beside = grub_cfg(machine).rpartition("/")[0] + "/grubenv"
    return next((n for n in (beside, *GRUBENVS) if machine.exists(n)), beside)


def unreached_grubenv(machine: Host) -> str:
    """Where a link of the environment block leads to that GRUB does not follow: onto another partition; else empty.

    Red Hat's packages for UEFI link it into the EFI system partition, also where the BIOS starts the machine.
    """
    block = machine.real(grubenv_name(machine))
    into_esp = [n.startswith("/boot/efi/") for n in (block, machine.real(grub_cfg(machine)))]
    return block if into_esp == [True, False] else ""


def grubenv(machine: Host) -> dict[str, str]:
    """Variables of GRUB's environment block."""
    name = grubenv_name(machine)
    if _is_torn(machine, name):
        return _variables((read_aside(machine, name) or b"").decode("utf-8", "replace"))
    return _variables(machine.peek(name))


def torn_grubenv(machine: Host) -> bool:
    """Whether a program that was killed left half an environment block, and the whole one is kept next to it."""
    return _is_torn(machine, grubenv_name(machine))


def _is_torn(machine: Host, name: str) -> bool:
    return is_aside(machine, name) and not machine.peek(name).startswith("# GRUB Environment Block")


def set_grubenv(machine: Machine, name: str, value: str) -> None:
    """Set or (with an empty value) unset a variable of GRUB's environment block. Raises EmupmemError."""
    file = grubenv_name(machine)
    program = next((p for p in ("grub-editenv", "grub2-editenv") if machine.find(p)), None)
    if program is None:
        raise EmupmemError("grub-editenv is not installed", install_hint(machine, "grub-editenv"))
    words = ("set", f"{name}={value}") if value else ("unset", name)
    # grub-editenv empties the file before it writes: it is given a copy, which then takes its place.
    target = machine.path(file)
    fresh = fresh_name(target)
    try:
        if target.exists():  # else it makes one
            write_like(fresh, target.read_bytes(), target)
        done = machine.run(
            Command((program, str(fresh), *words), "set GRUB's environment for the next start")
        )
        if done.status or _variables(peek_file(fresh)).get(name, "") != value:
            raise EmupmemError(f"{file} cannot be written: {done.last_words or 'it stays as it was'}")
        sync_file(fresh)
        fresh.rename(target)
        sync_folder(target.parent)
    except OSError as exc:
        raise EmupmemError(f"{file} cannot be written: {exc.strerror}", write_hint(exc)) from exc
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()
    log.file(machine, "wrote", file)


def generator(machine: Host) -> Command | None:
    """The program that makes grub.cfg from the defaults, None where there is none.

    grub-mkconfig is told to write the menu that lies here.
    """
    name = next((n for n in GENERATORS if has_program(machine, n)), "")
    return _generator_command(machine, name) if name else None


def generator_of_tree(machine: Host) -> Command:
    """The same for a tree: by its programs, else its /etc/os-release, else GRUB's own by the name of the menu's folder.

    Debian's where there is no os-release at all.
    """
    found = generator(machine)
    if found is not None:
        return found
    family = families(machine)
    own = "grub2-mkconfig" if "/grub2/" in grub_cfg(machine) else "grub-mkconfig"
    named = next((GENERATOR_OF[f] for f in family if f in GENERATOR_OF), own if family else GENERATORS[0])
    return _generator_command(machine, named)


def _generator_command(machine: Host, name: str) -> Command:
    argv = (name, "-o", grub_cfg(machine)) if name.endswith("mkconfig") else (name,)
    return Command(argv, "make grub.cfg from /etc/default/grub")


def _variables(text: str) -> dict[str, str]:
    """What an environment block of GRUB's says."""
    pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {key: value for key, eq, value in pairs if eq}


def grub_reads_bls(machine: Host) -> bool:
    """Whether GRUB takes its entries from files of the Boot Loader Specification."""
    try:
        menu = machine.text(grub_cfg(machine))
    except EmupmemError:
        menu = ""
    asked = re.search(
        r"^[ \t]*(?:export[ \t]+)?GRUB_ENABLE_BLSCFG=[\"']?true", machine.peek(GRUB_DEFAULT), re.MULTILINE
    )
    return grub_menu.uses_bls(menu) or asked is not None
