# SPDX-License-Identifier: Apache-2.0
"""Machines and trees whose boot entries belong to somebody else: what is said of them, and that nothing changes.

Each is the smallest picture of one: the marks that its boot loader leaves, and the files of the tool that
writes its entries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import detect, prepare, systemd_boot
from emupmem.boot.bls import menu
from emupmem.boot.grub import defaults
from emupmem.boot.grub.loader import Grub
from emupmem.doctor import look
from emupmem.model import EmupmemError, RootOnly
from emupmem.report import archive, collected, gather
from emupmem.system.machine import Machine
from tests import fake, pe
from tests.boot.test_loader import EFI_NAME, ID, ROOT, efi, without_grub
from tests.cli.runner import Run
from tests.cli.test_cli import log as log  # the fixture
from tests.crash import worlds
from tests.fake import FakeMachine, put, script

ESP = "/boot/efi"
HAND = f"title Linux\nlinux /vmlinuz\ninitrd /initrd\noptions {ROOT}\n"
EFIVARS = "/sys/firmware/efi/efivars"


def entries(machine: Machine, esp: str = ESP) -> None:
    """systemd-boot's entries and loader.conf, as they are left where another loader took over."""
    put(machine, f"{esp}/loader/entries/linux.conf", HAND)
    put(machine, f"{esp}/loader/loader.conf", "timeout 3\n")
    put(machine, "/etc/machine-id", f"{ID}\n")


def started_by(machine: Machine, name: str, line: str = ROOT) -> None:
    """The marks of a start: LoaderInfo (none where the name is empty), the kernel command line."""
    put(machine, f"{EFIVARS}/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", b"\x06\0\0\0\0")
    if name:
        efi(machine, "LoaderInfo", name)
    put(machine, "/proc/cmdline", f"{line}\n")


def limine(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "Limine 9.3.0", f"BOOT_IMAGE=/old initrd=\\x {ROOT}")
    put(machine, "/boot/limine.conf", f"/Linux\n protocol: linux\n cmdline: BOOT_IMAGE=/old {ROOT}\n")


def limine_tool(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "Limine 9.3.0")
    put(machine, "/boot/limine.conf", "/Linux\n")
    put(machine, "/etc/default/limine", f'ESP_PATH=/boot\nKERNEL_CMDLINE[default]+="{ROOT}"\n')
    script(machine, "limine-mkinitcpio", "#!/bin/sh\n")


def limine_bare(machine: Machine) -> None:
    limine_tool(machine)
    put(machine, "/etc/default/limine", "ESP_PATH=/boot\n#KERNEL_CMDLINE[default]=root=x\n")


def refind(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "rEFInd 0.14.2")
    put(machine, "/boot/refind_linux.conf", f'"Boot"  "{ROOT}"\n')
    stanza = f'menuentry Linux {{\n    loader /vmlinuz\n    options "{ROOT}"\n}}\n'
    put(machine, "/boot/EFI/refind/refind.conf", stanza)


def refind_silent(machine: Machine) -> None:
    refind(machine)
    (machine.root / EFIVARS[1:] / f"LoaderInfo-{EFI_NAME}").unlink()


def stub(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "Linux EFI stub 7.2.0")


def other(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "Visor {1}")


def nameless(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "")


def no_variables(machine: Machine) -> None:
    entries(machine)
    put(machine, "/proc/cmdline", ROOT)
    put(machine, "/sys/firmware/efi/fw_platform_size", "64\n")


def bios(machine: Machine) -> None:
    entries(machine)
    put(machine, "/proc/cmdline", ROOT)


def extlinux(machine: Machine) -> None:
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/vmlinuz {ROOT}")
    put(machine, "/boot/extlinux/extlinux.conf", f"LABEL a\nAPPEND {ROOT}\n")


def nothing(machine: Machine) -> None:
    put(machine, "/proc/cmdline", ROOT)


def pop(machine: Machine) -> None:
    entries(machine)
    started_by(machine, "systemd-boot 255.4")
    put(machine, "/etc/os-release", 'ID=pop\nID_LIKE="ubuntu debian"\n')
    put(machine, "/etc/kernelstub/configuration", '{"user": {"kernel_options": ["quiet"]}}\n')
    put(machine, f"{ESP}/loader/entries/Recovery-A.conf", "linux /EFI/Recovery/v\noptions boot=casper\n")


def cachyos(machine: Machine) -> None:
    entries(machine, "/boot")
    started_by(machine, "systemd-boot 257.5-1-arch")
    put(machine, "/etc/sdboot-manage.conf", 'LINUX_OPTIONS="quiet"\nLINUX_FALLBACK_OPTIONS="quiet"\n')


def nixos(machine: Machine) -> None:
    put(machine, "/boot/loader/entries/nixos-generation-42.conf", HAND + "options init=/nix/store/a-b/init\n")
    started_by(machine, "systemd-boot 257.5", f"initrd=\\x init=/nix/store/a-b/init {ROOT}")
    put(machine, "/etc/NIXOS", "")


def nixos_grub(machine: Machine) -> None:
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=(hd0)/vmlinuz init=/nix/store/a-b/init {ROOT}")
    put(machine, "/boot/grub/grub.cfg", f"menuentry x {{\n linux /vmlinuz {ROOT}\n}}\n")
    put(machine, "/etc/NIXOS", "")


def proxmox(machine: Machine) -> None:
    started_by(machine, "systemd-boot 252.5-2", f"initrd=\\x {ROOT} boot=zfs")
    put(machine, "/etc/kernel/cmdline", f"{ROOT} boot=zfs\n")
    put(machine, "/etc/kernel/proxmox-boot-uuids", "1234-ABCD\n5678-ABCD\n")
    put(machine, "/etc/default/grub", fake.STOCK)
    put(
        machine,
        "/boot/grub/grub.cfg",
        f"# grub.cfg is NOT read\nmenuentry x {{\n linux /vmlinuz {ROOT}\n}}\n",
    )


def proxmox_without_line(machine: Machine) -> None:
    proxmox(machine)
    (machine.root / "etc/kernel/cmdline").unlink()
    put(machine, "/usr/sbin/proxmox-boot-tool", "")


def uki(machine: Machine) -> None:
    started_by(machine, "systemd-boot 257.5")
    efi(machine, "StubInfo", "systemd-stub 257.5")
    put(machine, "/efi/EFI/Linux/arch-linux.efi", b"MZ")


def uki_default(machine: Machine) -> None:
    entries(machine, "/efi")
    started_by(machine, "systemd-boot 257.5")
    efi(machine, "LoaderEntrySelected", "linux.conf")
    efi(machine, "LoaderEntryDefault", "Arch-Linux.efi")
    put(machine, "/efi/EFI/Linux/arch-linux.efi", b"MZ")


def uki_default_by_bootctl(machine: Machine) -> None:
    entries(machine, "/efi")
    started_by(machine, "systemd-boot 257.5")
    put(machine, "/efi/EFI/x", b"")
    script(
        machine, "bootctl", """#!/bin/sh\necho '[{"id":"linux.conf"},{"id":"a.efi","isDefault":true}]'\n"""
    )


def uki_default_by_pattern(machine: Machine) -> None:
    uki_default(machine)
    (machine.root / EFIVARS[1:] / f"LoaderEntryDefault-{EFI_NAME}").unlink()
    put(machine, "/efi/loader/loader.conf", "default arch-*\n")


def zfsbootmenu(machine: Machine) -> None:
    """An image started by the firmware, which started the kernel of a dataset by kexec."""
    started_by(machine, "", "root=zfs:zroot/ROOT/debian quiet spl.spl_hostid=0x00bab10c")
    put(machine, "/proc/sys/kernel/bootloader_type", "208\n")
    efi(machine, "StubInfo", "systemd-stub 255.4")
    efi(machine, "StubImageIdentifier", "\\EFI\\ZBM\\VMLINUZ.EFI")
    put(machine, f"{ESP}/EFI/ZBM/VMLINUZ.EFI", pe.unified("6.6.50_1", "ro quiet loglevel=4"))


def bootc(machine: Machine) -> None:
    put(machine, "/run/ostree-booted", "")
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/ostree/x/vmlinuz {ROOT}")


def microos(machine: Machine) -> None:
    """openSUSE MicroOS with GRUB: the root is a read-only snapshot, the next one is made by transactional-update."""
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz {ROOT}\n")
    put(
        machine,
        "/proc/self/mountinfo",
        "61 1 0:33 /@/.snapshots/1/snapshot / ro,relatime - btrfs /dev/vda2 ro\n",
    )
    put(machine, "/etc/fstab", "# UUID=0 / btrfs rw 0 0\nUUID=1 / btrfs ro\n")
    put(machine, "/etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
    put(machine, "/boot/grub2/grub.cfg", f"menuentry 'x' {{\n linux /boot/vmlinuz {ROOT}\n}}\n")
    for folder in ("usr/sbin", "sbin"):
        path = put(machine, f"/{folder}/transactional-update", "#!/bin/sh\nexit 1\n")
        path.chmod(0o755)


def ostree_deployment(machine: Machine) -> None:
    """The root that a running ostree system has, without the disk that it is taken from."""
    put(machine, "/boot/loader/entries/ostree-1.conf", HAND)
    (machine.root / "ostree").symlink_to("sysroot/ostree")


NIX_WAY = 'boot.kernelParams = [ "memmap=1G!4G" ]; in /etc/nixos/configuration.nix (or your flake); then sudo nixos-'
UKI_WAY = (
    "sudo mkdir -p /efi/loader/addons; then sudo ukify build --stub=/usr/lib/systemd/boot/efi/addonx64.efi.stub "
    "--cmdline='memmap=1G!4G' --output=/efi/loader/addons/emupmem.addon.efi"
)
LIVE: dict[str, tuple[Callable[[Machine], None], str, str]] = {
    "limine": (
        limine,
        "Limine starts this machine",
        "add memmap=1G!4G to each cmdline: line of /boot/limine.conf",
    ),
    "limine with its tool": (
        limine_tool,
        "Limine starts this machine",
        'add the line KERNEL_CMDLINE[default]+=" memmap=1G!4G" to /etc/default/limine; then sudo limine-mkinitcpio',
    ),
    # A lone += would be the whole command line, without root=.
    "limine without KERNEL_CMDLINE": (
        limine_bare,
        "Limine starts this machine",
        f'add the line KERNEL_CMDLINE[default]="{ROOT} memmap=1G!4G" to /etc/default/limine; then sudo limine-mk',
    ),
    "refind": (
        refind,
        "rEFInd starts this machine",
        "add memmap=1G!4G to the options in each line of /boot/refind_",
    ),
    "refind without a name": (refind_silent, "rEFInd starts this machine", "memmap=1G!4G"),
    "efi stub": (stub, "the firmware started this kernel by itself (EFI stub)", "efibootmgr --create"),
    "another": (
        other,
        "started by Visor {1}, which emupmem does not know",
        "add memmap=1G!4G to the kernel command",
    ),
    "nameless": (
        nameless,
        "systemd-boot did not start this machine (it left no LoaderInfo)",
        "add memmap=1G!4G to",
    ),
    "no variables": (no_variables, "there are no EFI variables", "mount -t efivarfs"),
    "bios": (bios, "started by its BIOS, where systemd-boot does not exist", "add memmap=1G!4G to"),
    "extlinux": (extlinux, "extlinux starts this machine", "add memmap=1G!4G to each APPEND line"),
    "nothing": (
        nothing,
        "no boot loader that emupmem knows is set up here",
        "add memmap=1G!4G to the kernel",
    ),
    "pop": (pop, "kernelstub writes the boot entries here", "sudo kernelstub -a 'memmap=1G!4G'"),
    "cachyos": (
        cachyos,
        "sdboot-manage writes the boot entries here",
        'add the lines LINUX_OPTIONS+=" memmap=1G!4G" and LINUX_FALLBACK_OPTIONS+=" memmap=1G!4G" at the end of '
        "/etc/sdboot-manage.conf; then sudo sdboot-manage gen",
    ),
    "nixos": (nixos, "NixOS writes its boot entries from its configuration", NIX_WAY),
    "nixos with grub": (nixos_grub, "NixOS writes its boot entries from its configuration", NIX_WAY),
    "proxmox without its tool": (
        proxmox,
        "proxmox-boot-tool writes the boot entries here",
        "add memmap=1G!4G to the end of the first line of /etc/kernel/cmdline; then proxmox-boot-tool refresh",
    ),
    "uki": (uki, "a unified kernel image started this kernel", UKI_WAY),
    "uki by default": (uki_default, "a unified kernel image boots by default", UKI_WAY),
    "uki by default, as bootctl says": (
        uki_default_by_bootctl,
        "a unified kernel image boots by default",
        UKI_WAY,
    ),
    "uki by default, by a pattern": (
        uki_default_by_pattern,
        "a unified kernel image boots by default",
        UKI_WAY,
    ),
    "zfsbootmenu": (
        zfsbootmenu,
        "ZFSBootMenu starts this kernel by kexec",
        "add memmap=1G!4G to what zfs get org.zfsbootmenu:commandline zroot/ROOT/debian shows; then "
        "sudo zfs set org.zfsbootmenu:commandline='ALL THE WORDS' zroot/ROOT/debian",
    ),
    "microos": (
        microos,
        "the root of this system is read-only, its menu changes with the next snapshot",
        "add memmap=1G!4G to GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub; then sudo transactional-update grub.cfg",
    ),
    "bootc": (
        bootc,
        "an ostree system without rpm-ostree",
        "bootc loader-entries set-options-for-source --source emupmem --options 'memmap=1G!4G'",
    ),
}


@pytest.fixture(params=LIVE)
def owned(request: pytest.FixtureRequest, here: FakeMachine) -> tuple[FakeMachine, str, str]:
    build, reason, way = LIVE[request.param]
    without_grub(here)
    build(here)
    return here, reason, way


def test_apply_changes_nothing_and_gives_the_other_tools_own_way(
    owned: tuple[FakeMachine, str, str],
    run: Run,
) -> None:
    machine, reason, way = owned
    before = worlds.look(machine.root)
    for more in ((), ("--check",), ("--trial",), ("--mount", "/mnt/pmem")):
        done = run("apply", "--size", "1G", "--yes", *more)
        assert done.status == 1, done
        assert reason in done.err
        assert way in done.err
    assert worlds.look(machine.root) == before


def test_nokaslr_comes_with_it(owned: tuple[FakeMachine, str, str], run: Run) -> None:
    _, _, way = owned
    done = run("apply", "--size", "1G", "--yes", "--nokaslr")
    assert way.partition("memmap=1G!4G")[0] in done.err
    assert "memmap=1G!4G" not in way or "memmap=1G!4G nokaslr" in done.err


@pytest.mark.slow
def test_suggest_does_not_send_anybody_to_apply(owned: tuple[FakeMachine, str, str], run: Run) -> None:
    machine, reason, way = owned
    for root in (True, False):
        machine.root_user = root
        done = run("suggest", "--size", "1G")
        assert done.status == 0, done
        assert "sudo emupmem apply" not in done.out + done.err
        assert "emupmem apply refuses here: " in done.out
        assert reason in done.out
        assert way in done.out.rpartition("Next:  ")[2]
    found = run("suggest", "--size", "1G", "--json").json
    assert reason in found["refused"]["message"]
    assert way in found["refused"]["hint"]


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("unseen", [True, False])
def test_suggest_says_nothing_of_what_only_root_could_tell(
    here: FakeMachine, log: str, run: Run, monkeypatch: pytest.MonkeyPatch, root: bool, unseen: bool
) -> None:
    def refuse(*_: object) -> None:
        raise (RootOnly if unseen else EmupmemError)("no such entry", "run it with sudo")

    here.root_user = root
    monkeypatch.setattr(prepare, "prepare_apply", refuse)
    done = run("suggest", "--size", "1G")
    assert ("no such entry" in done.out) == (root or not unseen)


def test_suggest_names_what_starts_the_machine(here: FakeMachine, log: str, run: Run, tmp_path: Path) -> None:
    assert run("suggest", "--json").json["loader"] == "GRUB"
    without_grub(here)
    pop(here)
    assert run("suggest", "--json").json["loader"] == "kernelstub"
    assert run("suggest", "--from", log, "--json").json["loader"] == "", "a log does not tell it"
    archived = tmp_path / "pop.tar.gz"
    assert run("collect", str(archived)).status == 0
    assert run("suggest", "--from", str(archived), "--json").json["loader"] == "kernelstub"


def test_remove_gives_the_way_back(owned: tuple[FakeMachine, str, str], run: Run) -> None:
    machine, _, _ = owned
    put(machine, "/proc/cmdline", machine.peek("/proc/cmdline") + " memmap=1G!4G\n")
    before = worlds.look(machine.root)
    done = run("remove", "--yes")
    # Entries that are ours in all but the default are cleared as ever.
    assert done.status == (0 if type(detect.of(machine)) is systemd_boot.SystemdBoot else 1)
    assert done.status == 0 or len(done.err.splitlines()) == 2
    assert worlds.look(machine.root) == before


@pytest.mark.slow
def test_the_doctor_says_the_same(owned: tuple[FakeMachine, str, str]) -> None:
    machine, reason, way = owned
    for seen in (
        look.findings_of(machine),
        look.findings_of(collected.Collected(gather.gather_machine(machine).archive)),
    ):
        found = {f.name: f for f in seen}
        assert found["loader"].status == "stop"
        assert reason in found["loader"].evidence
        assert found["loader"].fix
        assert found["plan"].status == "stop"
        assert "emupmem apply" not in found["plan"].fix
        assert way.partition("memmap=1G!4G")[0] in found["plan"].fix


@pytest.mark.slow
def test_an_archive_is_planned_with_the_same_words(
    owned: tuple[FakeMachine, str, str],
    run: Run,
    tmp_path: Path,
) -> None:
    machine, reason, way = owned
    (tmp_path / "a.tar.gz").write_bytes(archive.pack(gather.gather_machine(machine).archive))
    done = run("suggest", "--size", "1G", "--from", str(tmp_path / "a.tar.gz"))
    assert "sudo emupmem apply" not in done.out
    assert reason in done.out
    assert way.partition("memmap=1G!4G")[0] in done.out


def test_verify_needs_no_loader(owned: tuple[FakeMachine, str, str], run: Run) -> None:
    assert run("verify", "--wait", "0").status in (0, 3)


def test_the_way_back_of_kernelstub_names_what_is_reserved(here: FakeMachine, run: Run) -> None:
    without_grub(here)
    pop(here)
    put(here, "/proc/cmdline", f"{ROOT} memmap=2G!4G\n")
    assert "sudo kernelstub -d 'memmap=2G!4G'" in run("remove", "--yes").err


def test_every_refusal_has_a_second_line(here: FakeMachine, run: Run) -> None:
    """Of the words, and of those that other checks say."""
    without_grub(here)
    efi(here, "LoaderInfo", "systemd-boot 257")
    put(here, "/proc/cmdline", ROOT)
    done = run("apply", "--size", "1G", "--yes")
    assert "no boot entries that start this system" in done.err
    assert len(done.err.splitlines()) == 2


def test_suggest_where_apply_refuses_for_another_reason(here: FakeMachine, run: Run) -> None:
    put(here, "/run/systemd/container", "lxc")
    done = run("suggest", "--size", "1G")
    assert "sudo emupmem apply" not in done.out
    assert "emupmem apply refuses here: this is" in done.out


# GRUB behind another loader ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["systemd-boot 257.5", "rEFInd 0.14.2", "Linux EFI stub 7.2.0", "", "Limine 9"]
)
def test_grub_that_another_loader_started(here: FakeMachine, run: Run, name: str) -> None:
    """The command line is GRUB's: BOOT_IMAGE= is its first word."""
    entries(here)
    started_by(here, name, here.peek("/proc/cmdline"))
    entry = (here.root / ESP[1:] / "loader/entries/linux.conf").read_text()
    assert isinstance(detect.of(here), Grub)
    assert run("apply", "--size", "1G", "--yes").status == 0
    assert "memmap=1G!4G" in fake.menu(here)
    assert (here.root / ESP[1:] / "loader/entries/linux.conf").read_text() == entry


def test_a_copied_boot_image_does_not_make_it_grub(here: FakeMachine) -> None:
    entries(here)
    put(here, f"{ESP}/loader/entries/linux.conf", HAND.replace(ROOT, f"BOOT_IMAGE=/old {ROOT}"))
    started_by(here, "systemd-boot 257.5", f"BOOT_IMAGE=/old {ROOT}")
    assert type(detect.of(here)) is systemd_boot.SystemdBoot


# Proxmox that GRUB starts ---------------------------------------------------------------------------------


def proxmox_by_grub(machine: FakeMachine) -> None:
    put(machine, "/etc/kernel/proxmox-boot-uuids", "1234-ABCD\n")
    copy = f"cat '{machine.root}/etc/default/grub' > '{machine.root}/copy'"
    script(machine, "proxmox-boot-tool", f'#!/bin/sh\n[ "$*" = refresh ] || exit 1\n{copy}\n')
    generator = (machine.root / "sbin/update-grub2").read_text()
    script(machine, "update-grub2", f'{generator}\n"$root/sbin/proxmox-boot-tool" refresh\n')


def test_proxmox_by_grub_says_what_is_not_checked(here: FakeMachine, run: Run) -> None:
    proxmox_by_grub(here)
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert "GRUB reads the copies of the menu that proxmox-boot-tool makes" in done.err
    assert "memmap=1G!4G" in (here.root / "copy").read_text()
    assert "proxmox-boot-tool" in run("apply", "--size", "2G", "--replace", "--trial", "--yes").err


def test_a_rollback_makes_proxmox_copy_the_old_menu_again(here: FakeMachine, run: Run) -> None:
    proxmox_by_grub(here)
    generator = (here.root / "sbin/update-grub2").read_text()
    script(here, "update-grub2", f"{generator}\nexit 1\n")
    assert run("apply", "--size", "1G", "--yes").status == 1
    assert (here.root / "copy").read_bytes() == fake.STOCK


# Trees ------------------------------------------------------------------------------------------------------


def bare(root: Path) -> Machine:
    """An empty tree."""
    root.mkdir()
    return Machine(root)


def grub_menu(machine: Machine) -> None:
    put(machine, "/etc/default/grub", fake.STOCK)
    put(machine, "/boot/grub/grub.cfg", f"menuentry x {{\n linux /vmlinuz {ROOT}\n}}\n")


def with_both(machine: Machine) -> None:
    entries(machine)
    grub_menu(machine)
    put(machine, f"{ESP}/EFI/BOOT/BOOTX64.EFI", b"MZ\0#### LoaderInfo: systemd-boot 257 ####")


def only_entries(machine: Machine) -> None:
    put(machine, f"{ESP}/loader/entries/linux.conf", HAND)


def limine_and_grub(machine: Machine) -> None:
    grub_menu(machine)
    put(machine, "/boot/limine.conf", "/Linux\n")


def deployed(machine: Machine) -> None:
    put(machine, "/ostree/repo/config", "")


TREES: dict[str, tuple[Callable[[Machine], None], str, str]] = {
    **{n: LIVE[n] for n in ("limine with its tool", "limine", "refind", "extlinux", "pop", "cachyos")},
    **{n: LIVE[n] for n in ("nixos", "nixos with grub", "nothing")},
    "limine without KERNEL_CMDLINE": (
        limine_bare,
        "Limine",
        "to the whole command line, root= included, and memmap=1G!4G; then sudo limine",
    ),
    "proxmox without a line": (
        proxmox_without_line,
        "proxmox-boot-tool writes the boot entries of this tree",
        "to the end of the first line of /etc/kernel/cmdline, which is to be the whole kernel command line; then "
        "proxmox-boot-tool refresh",
    ),
    "uki": (uki, "a unified kernel image boots by default", UKI_WAY),
    "uki by default, by a pattern": (
        uki_default_by_pattern,
        "a unified kernel image boots by default",
        UKI_WAY,
    ),
    "both": (with_both, "this tree has GRUB and systemd-boot", "run emupmem on that machine"),
    "limine and grub": (limine_and_grub, "this tree has GRUB and Limine", "run emupmem on that machine"),
    "only entries": (only_entries, "neither systemd-boot nor a loader.conf", "run emupmem there"),
    "microos": LIVE["microos"],
    "ostree deployment": (ostree_deployment, "the tree of an ostree system", "run emupmem on that machine"),
    "ostree": (deployed, "the tree of an ostree system", "run emupmem on that machine"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_somebody_else_stays_as_it_is(name: str, tmp_path: Path, run: Run, log: str) -> None:
    build, reason, way = TREES[name]
    machine = bare(tmp_path / "tree")
    build(machine)
    before = worlds.look(machine.root)
    done = run("apply", "--size", "1G", "--yes", "--root", str(machine.root), "--from", log)
    assert done.status == 1, done
    assert reason in done.err
    assert way in done.err
    # Entries that are ours in all but the default are cleared as ever.
    cleared = name == "uki by default, by a pattern"
    assert run("remove", "--yes", "--root", str(machine.root)).status == (0 if cleared else 1)
    assert worlds.look(machine.root) == before


def applied(machine: Machine, run: Run, log: str) -> list[str]:
    """The files of a tree that have the reservation afterwards."""
    done = run("apply", "--size", "1G", "--yes", "--root", str(machine.root), "--from", log)
    assert done.status == 0, done
    found = worlds.look(machine.root)
    return sorted(n for n, node in found.items() if b"memmap=1G!4G" in node.data and not n.startswith("var/"))


@pytest.mark.parametrize(
    "config", ["default b-main.conf", "default b-*", "timeout 1\ndefault B-MAIN", "#default a*\n"]
)
def test_the_default_of_loader_conf_is_the_model_of_new_kernels(
    config: str,
    tmp_path: Path,
    run: Run,
    log: str,
) -> None:
    machine = bare(tmp_path / "tree")
    put(machine, f"{ESP}/loader/entries/a-old.conf", HAND.replace("quiet", "single debug"))
    put(machine, f"{ESP}/loader/entries/b-main.conf", HAND)
    put(machine, f"{ESP}/loader/loader.conf", f"{config}\n")
    put(machine, "/usr/bin/kernel-install", "#!/bin/sh\n").chmod(0o755)
    names = [
        "boot/efi/loader/entries/a-old.conf",
        "boot/efi/loader/entries/b-main.conf",
        "etc/kernel/cmdline",
    ]
    assert applied(machine, run, log) == names
    assert machine.peek("/etc/kernel/cmdline") == f"{ROOT} memmap=1G!4G"


def test_kernel_install_of_the_host_does_not_count(
    tmp_path: Path, run: Run, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = bare(tmp_path / "tree")
    entries(machine)
    monkeypatch.setattr(Machine, "find", lambda self, program: f"/usr/bin/{program}")
    assert applied(machine, run, log) == ["boot/efi/loader/entries/linux.conf"]


def test_entries_of_other_systems_in_a_tree_keep_their_words(tmp_path: Path, run: Run, log: str) -> None:
    machine = bare(tmp_path / "tree")
    entries(machine)
    put(machine, f"{ESP}/loader/loader.conf", "default zz-*\n")
    put(machine, "/etc/fstab", "# the root\nUUID=0 / ext4 defaults 0 1\n")
    put(machine, f"{ESP}/loader/entries/zz-fedora.conf", HAND.replace("UUID=0", "UUID=9"))
    put(machine, f"{ESP}/loader/entries/rescue.conf", "linux /v\noptions boot=casper noprompt\n")
    put(machine, f"{ESP}/loader/entries/fallback+3.conf", HAND)
    assert applied(machine, run, log) == [
        "boot/efi/loader/entries/fallback+3.conf",
        "boot/efi/loader/entries/linux.conf",
    ]


def test_the_menu_is_sorted_as_systemd_boot_does(tmp_path: Path) -> None:
    machine = bare(tmp_path / "tree")
    keyed = f"sort-key debian\nmachine-id {ID}\n{HAND}version "
    put(machine, f"{ESP}/loader/entries/d-6.9.conf", f"{keyed}6.9\n")
    put(machine, f"{ESP}/loader/entries/d-6.12+3-1.conf", f"{keyed}6.12\n")
    put(machine, f"{ESP}/loader/entries/d-7.conf", f"{keyed}7\n".replace("debian", "fedora"))
    put(machine, f"{ESP}/loader/entries/d-8+0-3.conf", f"{keyed}8\n")
    put(machine, f"{ESP}/loader/entries/zz.conf", HAND)
    put(machine, f"{ESP}/loader/entries/zz9.conf", HAND)
    wanted = ["d-6.12.conf", "d-6.9.conf", "d-7.conf", "zz9.conf", "zz.conf", "d-8.conf"]
    assert menu.menu_names(machine) == wanted


# /etc/default/grub.d -------------------------------------------------------------------------------------------

READS = "#! /bin/sh\nfor x in ${sysconfdir}/default/grub.d/*.cfg ; do . $x; done\n"
READS_NOT = "#! /bin/sh\ngrub_mkconfig_dir=${sysconfdir}/grub.d\n. ${sysconfdir}/default/grub\n"


@pytest.mark.parametrize(
    ("files", "reads"),
    [
        ({"/usr/bin/grub-mkconfig": READS_NOT}, False),
        ({"/usr/bin/grub-mkconfig": READS_NOT, "/etc/os-release": "ID=debian\n"}, False),
        ({"/usr/sbin/grub2-mkconfig": READS, "/etc/os-release": "ID=fedora\n"}, True),
        ({"/etc/os-release": "NAME=x\nID=arch\n"}, False),
        ({"/etc/os-release": 'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n'}, False),
        ({"/etc/os-release": "ID=ubuntu\n"}, True),
        ({"/etc/os-release": 'ID=linuxmint\nID_LIKE="ubuntu debian"\n'}, True),
        ({}, True),
    ],
)
def test_drop_ins_are_used_only_where_they_are_read(
    files: dict[str, str],
    reads: bool,
    tmp_path: Path,
    run: Run,
    log: str,
) -> None:
    machine = bare(tmp_path / "tree")
    grub_menu(machine)
    put(machine, "/etc/default/grub.d/99-nvidia.cfg", 'GRUB_CMDLINE_LINUX="nvidia_drm.modeset=1"\n')
    for name, text in files.items():
        put(machine, name, text)
    assert defaults.reads_dropins(machine) is reads
    written = "etc/default/grub.d/zz-emupmem.cfg" if reads else "etc/default/grub"
    assert applied(machine, run, log) == [written]
    assert run("remove", "--yes", "--root", str(machine.root)).status == 0
    assert machine.read("/etc/default/grub") == fake.STOCK


def test_a_drop_in_of_ours_that_nothing_reads_goes(tmp_path: Path, run: Run, log: str) -> None:
    machine = bare(tmp_path / "tree")
    grub_menu(machine)
    put(machine, "/etc/default/grub.d/99-nvidia.cfg", 'GRUB_CMDLINE_LINUX="nvidia_drm.modeset=1"\n')
    applied(machine, run, log)
    assert machine.exists("/etc/default/grub.d/zz-emupmem.cfg")
    put(machine, "/usr/bin/grub-mkconfig", READS_NOT)
    assert applied(machine, run, log) == ["etc/default/grub"]
    assert not machine.exists("/etc/default/grub.d/zz-emupmem.cfg")


def test_live_a_left_over_drop_in_does_not_matter(here: FakeMachine, run: Run) -> None:
    put(here, "/etc/default/grub.d/99-nvidia.cfg", 'GRUB_CMDLINE_LINUX="nvidia_drm.modeset=1"\n')
    put(here, "/etc/os-release", "ID=arch\n")
    generator = (here.root / "sbin/update-grub2").read_text().replace("default/grub.d", "default/nowhere")
    (here.root / "sbin/update-grub2").unlink()
    script(here, "grub-mkconfig", generator)
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert here.names("/etc/default/grub.d") == ["99-nvidia.cfg"]
    assert "memmap=1G!4G" in fake.menu(here)
