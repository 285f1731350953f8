# SPDX-License-Identifier: Apache-2.0
"""Boot loaders and tools that own their boot entries: why emupmem leaves them alone, and their own way. Pure.

An edit of what they generate would be lost at the next update, or never reach the kernel. The sentences and
commands here are what `apply`, `remove`, `suggest` and `doctor` say of them.
"""

from __future__ import annotations

from emupmem.model import EmupmemError
from emupmem.record import record

PLACEHOLDER = "memmap=SIZE!START"
"""What stands for the words while nothing is planned."""

NIXOS_MARK = "/etc/NIXOS"
KERNELSTUB_CONFIG = "/etc/kernelstub/configuration"
SDBOOT_MANAGE_CONFIG = "/etc/sdboot-manage.conf"
SDBOOT_MANAGE_DROPINS = ("/usr/lib/sdboot-manage.conf.d", "/etc/sdboot-manage.conf.d")
PROXMOX_ESPS = "/etc/kernel/proxmox-boot-uuids"
LIMINE_DEFAULTS = "/etc/default/limine"
LIMINE_FOLDERS = ("/usr/share/limine-entry-tool.d", "/etc/limine-entry-tool.d")
LIMINE_TOOL_CONFIG = "/etc/limine-entry-tool.conf"
LIMINE_CONFIGS = tuple(
    f"{folder}/limine.conf"
    for esp in ("/boot", "/efi", "/boot/efi")
    for folder in (esp, f"{esp}/limine", f"{esp}/EFI/limine", f"{esp}/EFI/BOOT", f"{esp}/EFI/arch-limine")
)
REFIND_CONFIGS = (
    "/boot/refind_linux.conf",
    *(
        f"{esp}/EFI/{name}/refind.conf"
        for name in ("refind", "BOOT")
        for esp in ("/boot", "/efi", "/boot/efi")
    ),
)
EXTLINUX_CONFIGS = ("/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg", "/boot/extlinux.conf")

SIGNS = (
    NIXOS_MARK,
    KERNELSTUB_CONFIG,
    SDBOOT_MANAGE_CONFIG,
    PROXMOX_ESPS,
    *LIMINE_CONFIGS,
    *REFIND_CONFIGS,
    *EXTLINUX_CONFIGS,
)
"""Files that tell by being there."""

LIMINE_TOOLS = ("limine-update", "limine-mkinitcpio")
PROXMOX_REFRESH = ("proxmox-boot-tool", "refresh")


@record
class Owner:
    """What owns the boot entries of a machine.

    `title` names it, `reason` is the first line of the refusal. `add` are the steps that bring words onto the
    kernel command line, `drop` those that take them off; `{words}` stands for the words.
    """

    title: str
    reason: str
    add: tuple[str, ...]
    drop: tuple[str, ...]

    def way(self, words: str = PLACEHOLDER) -> str:
        """How to add words by hand, in one line."""
        return "; then ".join(self.add).format(words=words)

    def way_back(self, words: str = PLACEHOLDER) -> str:
        """How to take them off by hand, in one line."""
        return "; then ".join(self.drop).format(words=words)


class Refused(EmupmemError):
    """The machine belongs to another tool; the hint is that tool's own way, for these words."""

    def __init__(self, by: Owner, words: str = PLACEHOLDER) -> None:
        super().__init__(by.reason, by.way(words))
        self.by = by

    def for_words(self, words: str) -> Refused:
        """The same with the words that were planned."""
        return Refused(self.by, words)


class RefusedRemoval(EmupmemError):
    """The same where something is to be given back."""

    def __init__(self, by: Owner, words: str = PLACEHOLDER) -> None:
        super().__init__(by.reason, by.way_back(words))


def _owner(title: str, reason: str, where: str, run: str = "") -> Owner:
    """An owner whose words stand in a file, and the command that makes the entries of it."""
    after = (run,) if run else ()
    return Owner(
        title, reason, (f"add {{words}} to {where}", *after), (f"take {{words}} out of {where}", *after)
    )


def _plain(text: str) -> str:
    """Text that stays as it is when words are filled in."""
    return text.replace("{", "{{").replace("}", "}}")


# The module boot.kernelParams; every generation's entries are written from it (systemd-boot-builder.py).
NIXOS = Owner(
    "NixOS",
    "NixOS writes its boot entries from its configuration: what is put into them by hand is lost with the next "
    "generation",
    (
        'boot.kernelParams = [ "{words}" ]; in /etc/nixos/configuration.nix (or your flake)',
        "sudo nixos-rebuild boot",
    ),
    ('remove "{words}" from boot.kernelParams', "sudo nixos-rebuild boot"),
)

# kernelstub/application.py: -a adds options that are not there, -d deletes them, both write the entries.
# Single quotes: an interactive bash expands ! inside double ones.
KERNELSTUB = Owner(
    "kernelstub",
    f"kernelstub writes the boot entries here, from {KERNELSTUB_CONFIG}: what is put into them by hand is lost "
    "with the next kernel",
    ("sudo kernelstub -a '{words}'",),
    ("sudo kernelstub -d '{words}'",),
)

# sdboot-manage sources its configuration with bash, so += extends what is there.
SDBOOT_MANAGE = Owner(
    "sdboot-manage",
    f"sdboot-manage writes the boot entries here, from {SDBOOT_MANAGE_CONFIG}: what is put into them by hand is "
    "lost with the next kernel",
    (
        f'add the lines LINUX_OPTIONS+=" {{words}}" and LINUX_FALLBACK_OPTIONS+=" {{words}}" at the end of '
        f"{SDBOOT_MANAGE_CONFIG}",
        "sudo sdboot-manage gen",
    ),
    (
        f"take {{words}} out of LINUX_OPTIONS and LINUX_FALLBACK_OPTIONS in {SDBOOT_MANAGE_CONFIG}",
        "sudo sdboot-manage gen",
    ),
)

# zz-proxmox-boot reads the first line only, and writes the entries onto each partition of the list.
PROXMOX = _owner(
    "proxmox-boot-tool",
    "proxmox-boot-tool writes the boot entries here, onto partitions that are not mounted",
    "the end of the first line of /etc/kernel/cmdline",
    "proxmox-boot-tool refresh",
)

PROXMOX_TREE = Owner(
    PROXMOX.title,
    "proxmox-boot-tool writes the boot entries of this tree, onto partitions that are not in it",
    (
        "run emupmem on that machine; where systemd-boot starts it (UEFI): add {words} to the end of the first "
        "line of /etc/kernel/cmdline, which is to be the whole kernel command line",
        "proxmox-boot-tool refresh",
    ),
    (
        "run emupmem on that machine; where systemd-boot starts it (UEFI): remove {words} from /etc/kernel/cmdline",
        "proxmox-boot-tool refresh",
    ),
)

REFIND = _owner(
    "rEFInd",
    "rEFInd starts this machine, and emupmem does not change its configuration",
    "the options in each line of /boot/refind_linux.conf (or of the menuentry in refind.conf)",
)

EXTLINUX = _owner(
    "extlinux",
    "extlinux starts this machine, and emupmem does not change its configuration",
    "each APPEND line of its configuration (/boot/extlinux/extlinux.conf)",
)

EFI_STUB = _owner(
    "the firmware",
    "the firmware started this kernel by itself (EFI stub): its command line is in the firmware's boot entry",
    "that entry: efibootmgr -v shows it, efibootmgr --create … --unicode 'ALL THE WORDS' makes a new one",
)


def zfsbootmenu(dataset: str) -> Owner:
    """ZFSBootMenu: a property of the root dataset, inherited from those above it, is the command line."""
    name = "org.zfsbootmenu:commandline"
    there = f"what zfs get {name} {dataset} shows"
    run = f"sudo zfs set {name}='ALL THE WORDS' {dataset}"
    reason = (
        f"ZFSBootMenu starts this kernel by kexec: its command line is the property {name} of its dataset"
    )
    return Owner(
        "ZFSBootMenu", reason, (f"add {{words}} to {there}", run), (f"take {{words}} out of {there}", run)
    )


_OSTREE = "bootc loader-entries set-options-for-source --source emupmem"

BOOTC = Owner(
    "bootc",
    "this is an ostree system without rpm-ostree: kernel arguments belong to the deployment",
    (f"sudo {_OSTREE} --options '{{words}}' (bootc of April 2026 or later)",),
    (f"sudo {_OSTREE}",),
)


# transactional-update(8), the command grub.cfg: the menu of the next snapshot, which the next start has.
TRANSACTIONAL = _owner(
    "transactional-update",
    "the root of this system is read-only, its menu changes with the next snapshot that transactional-update makes",
    "GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub",
    "sudo transactional-update grub.cfg",
)


def grubby_there(entry: str, variable: str) -> Owner:
    """A tree with entries whose words are in GRUB's environment block: there only grubby knows all places."""
    run = "on that machine: sudo grubby --update-kernel=ALL"
    return Owner(
        "grubby",
        f"{entry} takes its words from ${variable} of GRUB's environment block: grubby changes those, on that machine",
        (f"{run} --args='{{words}}'",),
        (f"{run} --remove-args='{{words}}'",),
    )


NOTHING_KNOWN = _owner(
    "no boot loader",
    "no boot loader that emupmem knows is set up here",
    "the kernel command line, in whatever starts this kernel",
)

TREE_UNKNOWN = _owner(
    "an unknown boot loader",
    "this tree has boot entries, but neither systemd-boot nor a loader.conf: what reads them cannot be known",
    "the kernel command line by the means of that machine, or run emupmem there",
)


def limine(config: str, tool: str, layered: bool, line: str) -> Owner:
    """Limine. `tool` makes its entries (empty where nothing does, and `config` is written by hand).

    `layered` says that its KERNEL_CMDLINE[default] has a root= already. Where it has none, a lone += would be
    the whole command line, without root=: then it is given as a whole, from the words of `line`.
    """
    title, reason = "Limine", "Limine starts this machine, and emupmem does not change its configuration"
    if not tool:
        return _owner(title, reason, f"each cmdline: line of {config}")
    run = f"sudo {tool}"
    drop = (f"take {{words}} out of KERNEL_CMDLINE[default] in {LIMINE_DEFAULTS}", run)
    if layered:
        add = f'add the line KERNEL_CMDLINE[default]+=" {{words}}" to {LIMINE_DEFAULTS}'
    elif line and '"' not in line:
        add = f'add the line KERNEL_CMDLINE[default]="{_plain(line)} {{words}}" to {LIMINE_DEFAULTS}'
    else:
        whole = "the whole command line, root= included, and {words}"
        add = f"set KERNEL_CMDLINE[default] in {LIMINE_DEFAULTS} to {whole}"
    return Owner(title, reason, (add, run), drop)


UNIFIED = "a unified kernel image"

_ADDON = "sudo ukify build --stub=/usr/lib/systemd/boot/efi/addonx64.efi.stub --cmdline='{words}' --output="


def unified(esp: str, started: bool) -> Owner:
    """A unified kernel image, which did (`started`) or will start the kernel; `esp` is where its partition is.

    systemd-stub(7), since version 254: loader/addons/*.addon.efi add to the command line of every image.
    """
    reason = "a unified kernel image started this kernel: its command line is built into it"
    if not started:
        reason = "a unified kernel image boots by default: its command line is built into it, boot entries have no say"
    folder = f"{esp}/loader/addons"
    add = (
        f"sudo mkdir -p {folder}",
        f"{_ADDON}{folder}/emupmem.addon.efi (signed, where Secure Boot is on)",
    )
    return Owner(UNIFIED, reason, add, (f"sudo rm {folder}/emupmem.addon.efi",))


def built_in_line(image: str, why: str, where: str, run: str) -> Owner:
    """An image that takes no addon: its words are built into it from `where` when `run` makes it anew."""
    add, drop = f"add {{words}} to {_plain(where)}", f"take {{words}} out of {_plain(where)}"
    return Owner(UNIFIED, f"{image}: {why}", (add, run), (drop, run))


def shared_images(other: str, own: str) -> Owner:
    """Images of two systems on one partition: an addon for one of them has to be made by hand."""
    reason = f"{other} starts another system, and an addon for all images would reserve memory there as well"
    folder = _plain(f"{own}.extra.d")
    add = (
        f"sudo mkdir -p {folder}",
        f"{_ADDON}{folder}/emupmem.addon.efi (for this image only: again for each new kernel)",
    )
    return Owner(UNIFIED, reason, add, (f"sudo rm {folder}/emupmem.addon.efi",))


def unknown(name: str) -> Owner:
    """A boot loader that names itself and that emupmem does not know."""
    reason = f"this machine was started by {name}, which emupmem does not know"
    return _owner(name, reason, f"the kernel command line in the configuration of {_plain(name)}")


def unnamed(efi: bool, variables: bool) -> Owner:
    """Entries for systemd-boot are here, but it did not start this machine: it always leaves its name."""
    if not efi:
        reason = "this machine was started by its BIOS, where systemd-boot does not exist: its entries are not read"
    elif variables:
        reason = "systemd-boot did not start this machine (it left no LoaderInfo): its entries are not read"
    else:
        mount = "sudo mount -t efivarfs efivarfs /sys/firmware/efi/efivars shows it"
        reason = "what started this machine cannot be seen: there are no EFI variables"
        return Owner(
            "an unknown boot loader", reason, (f"{mount}, then try again",), (f"{mount}, then try again",)
        )
    where = "the kernel command line in the boot loader that is in use"
    return _owner("an unknown boot loader", reason, f"{where} (efibootmgr -v lists them)" if efi else where)


def several(titles: str) -> Owner:
    """A tree with more than one boot loader."""
    reason = f"this tree has {titles}: which one starts that machine cannot be known from it"
    return Owner(titles, reason, ("run emupmem on that machine",), ("run emupmem on that machine",))
