# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images on a machine in a folder (real tools: tests/scenario/test_uki.py)."""

from __future__ import annotations

import base64
import os
import signal
from pathlib import Path

import pytest

from emupmem.boot import addon, detect, obstacles, trial, uki
from emupmem.boot import efi as boot_efi
from emupmem.boot.bls import sources as bls_sources
from emupmem.boot.change import Change
from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_abandon, prepare_apply, prepare_confirm, prepare_trial
from emupmem.boot.transaction import carry_out_change
from emupmem.doctor import look
from emupmem.model import GIB, EmupmemError, Request
from emupmem.report import collected, gather
from tests import pe
from tests.boot.test_loader import ID, ROOT, apply, content, efi, program, remove, survey_of, systemd_boot
from tests.boot.test_oneshot import BOOTCTL
from tests.fake import RELEASE, FakeMachine, put, script

pytestmark = pytest.mark.slow  # the inner loop has each loader in test_loader.py

LINE = f"{ROOT} systemd.machine_id={ID}"
IMAGE = f"/boot/efi/EFI/Linux/{ID}-{RELEASE}.efi"
ADDON = f"/boot/efi/{addon.OURS}"
TRIAL = "/boot/efi/loader/entries/emupmem-trial.conf"

# After ukify 257 (pe_add_sections): `build` with a stub and a command line adds one section to the stub.
# With a key the directory of certificates is filled in, as sbsign does; the signature itself is left out.
UKIFY = """
import pathlib, struct, sys
if (pathlib.Path(ROOT) / "fail").exists():
    sys.exit("ValueError: no room for another section")
given = dict(a.lstrip("-").split("=", 1) for a in sys.argv[2:])
assert sys.argv[1] == "build" and given["config"] == "/dev/null"
data = bytearray(pathlib.Path(given["stub"]).read_bytes())
at = struct.unpack_from("<I", data, 0x3C)[0]
count = struct.unpack_from("<H", data, at + 6)[0]
line = given["cmdline"].encode()
struct.pack_into("<8sIIII", data, at + 264 + 40 * count, b".cmdline", len(line), 0x9000, 512, len(data))
struct.pack_into("<H", data, at + 6, count + 1)
data += line.ljust(512, bytes(1))
if "secureboot-private-key" in given:
    struct.pack_into("<II", data, at + 24 + 112 + 32, len(data), 8)
    data += bytes(8)
pathlib.Path(given["output"]).write_bytes(data)
"""

STUB = pe.program([(".text", b"\x90"), (".sdmagic", b"#### LoaderInfo: systemd-addon 257.9-1 ####\0")])


def unified(root: Path) -> FakeMachine:
    """A machine that systemd-boot starts, its kernels images; new ones are made by kernel-install."""
    machine = systemd_boot(root)
    for name in machine.names("/boot/efi/loader/entries"):
        (machine.root / "boot/efi/loader/entries" / name).unlink()
    (machine.root / "etc/kernel/cmdline").unlink()
    put(machine, "/etc/kernel/install.conf", "layout=uki\n")
    put(machine, IMAGE, pe.unified(RELEASE, LINE))
    put(machine, f"/boot/efi/EFI/Linux/{ID}-6.1.0-9.efi", pe.unified("6.1.0-9", LINE))
    put(machine, "/proc/cmdline", f"{LINE}\n")
    put(machine, boot_efi.SECURE_BOOT, b"\x06\0\0\0\0")
    put(machine, addon.STUB, STUB)
    efi(machine, "LoaderEntrySelected", f"{ID}-{RELEASE}.efi")
    efi(machine, "StubInfo", "systemd-stub 257.9-1")
    efi(machine, "StubImageIdentifier", IMAGE.removeprefix("/boot/efi").replace("/", "\\"))
    program(machine, "ukify", UKIFY)
    return machine


def by_firmware(root: Path) -> FakeMachine:
    """The same, started by the firmware itself."""
    machine = unified(root)
    for name in ("LoaderInfo", "LoaderEntrySelected"):
        (machine.root / boot_efi.efi_variable(name).lstrip("/")).unlink()
    return machine


def knows_trials(root: Path) -> FakeMachine:
    machine = unified(root)
    program(machine, "bootctl", BOOTCTL)
    put(machine, boot_efi.efi_variable("LoaderFeatures"), b"\x06\0\0\0\xff\x7f\0\0\0\0\0\0")
    return machine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return knows_trials(tmp_path)


def line(machine: FakeMachine) -> str:
    """The words of our addon."""
    file = machine.pe_file(ADDON)
    return file.line if file is not None else ""


def add(machine: FakeMachine, size: int, **options: bool) -> None:
    prepared = prepare_apply(machine, survey_of(machine), Request(size), Options(**options))  # type: ignore[arg-type]
    carry_out_change(machine, prepared)


@pytest.mark.parametrize("start", [unified, by_firmware])
def test_there_and_back(tmp_path: Path, start: object) -> None:
    assert callable(start)
    machine = start(tmp_path)
    before = content(machine)
    assert isinstance(detect.of(machine), uki.Unified)
    obstacles.refuse_machine(machine)
    apply(machine)
    assert line(machine) == "memmap=1G!4G"
    assert (machine.root / "etc/kernel/cmdline").read_text() == f"{ROOT}\n"
    assert content(machine).keys() - before.keys() == {ADDON[1:], "etc/kernel/cmdline"}
    standing = detect.of(machine).standing(machine)
    assert [e.text for e in standing.entries] == [f"{LINE} memmap=1G!4G"] * 2
    assert (standing.where, standing.items) == (ADDON, ("1G!4G",))
    add(machine, GIB, add=True, nokaslr=True)
    assert line(machine) == "memmap=1G!4G,1G!5G nokaslr"
    add(machine, 2 * GIB, replace=True)
    assert line(machine) == "memmap=2G!4G nokaslr"
    remove(machine)
    assert content(machine) == before
    assert not machine.exists("/boot/efi/loader/addons")


def test_the_default_of_a_boot_by_the_firmware_is_its_image(tmp_path: Path) -> None:
    machine = by_firmware(tmp_path)
    efi(machine, "StubImageIdentifier", f"\\EFI\\Linux\\{ID}-6.1.0-9.efi")
    default = detect.of(machine).target(machine)
    assert default is not None
    assert default.version == "6.1.0-9"
    put(machine, "/boot/efi/EFI/BOOT/BOOTX64.EFI", pe.unified("6.12.9", "root=LABEL=x"))
    efi(machine, "StubImageIdentifier", "\\EFI\\BOOT\\BOOTX64.EFI")
    default = detect.of(machine).target(machine)
    assert default is not None
    assert (default.kernel, default.version) == ("/EFI/BOOT/BOOTX64.EFI", "6.12.9")


def test_the_kernel_is_known_by_what_is_in_the_image(machine: FakeMachine) -> None:
    target = obstacles.target(machine)
    assert target is not None
    assert target.release == RELEASE
    assert machine.kernel_banner(IMAGE).startswith(f"Linux version {RELEASE} ")


def test_what_ukify_fails_at_changes_nothing(machine: FakeMachine) -> None:
    put(machine, "/fail", "")
    before = content(machine)
    with pytest.raises(EmupmemError, match="ukify failed with status 1: ValueError: no room"):
        apply(machine)
    (machine.root / "fail").unlink()
    program(machine, "ukify", UKIFY.replace('given["cmdline"]', '"quiet"'))
    with pytest.raises(EmupmemError, match="ukify did not make the addon that was asked for"):
        apply(machine)
    (machine.root / "sbin/ukify").write_text("#!/bin/sh\n")
    with pytest.raises(EmupmemError, match="ukify did not make the addon"):
        apply(machine)
    assert content(machine) == before


def test_a_damaged_addon_of_ours_is_made_anew_or_taken_away(machine: FakeMachine) -> None:
    put(machine, ADDON, b"MZ torn")
    apply(machine)
    assert line(machine) == "memmap=1G!4G"
    put(machine, ADDON, b"")
    remove(machine)
    assert not machine.exists(ADDON)


@pytest.mark.parametrize(
    "place", [f"/boot/efi/{addon.FOLDER}/pmem.addon.efi", f"{IMAGE}.extra.d/emupmem.addon.efi"]
)
def test_an_addon_of_somebody_else_is_in_the_way(machine: FakeMachine, place: str) -> None:
    put(machine, place, pe.addon("memmap=1G!8G"))
    with pytest.raises(EmupmemError, match=f"{place} has memmap=1G!8G built into it") as told:
        add(machine, 2 * GIB, replace=True)
    assert f"sudo rm {place}" in told.value.hint
    with pytest.raises(EmupmemError, match=f"{place} has memmap=1G!8G built into it"):
        remove(machine)


def test_other_words_of_addons_stay(machine: FakeMachine) -> None:
    put(machine, f"/boot/efi/{addon.FOLDER}/quiet.addon.efi", pe.addon("splash"))
    put(machine, f"{IMAGE}.extra.d/one.addon.efi", pe.addon("debug", more=[(".uname", RELEASE.encode())]))
    put(machine, f"{IMAGE}.extra.d/two.addon.efi", pe.addon("wrong", more=[(".uname", b"6.1.0-9")]))
    put(machine, f"{IMAGE}.extra.d/three.efi", pe.addon("no.addon"))
    apply(machine)
    texts = {e.text for e in detect.of(machine).standing(machine).entries}
    assert texts == {f"{LINE} memmap=1G!4G splash debug", f"{LINE} memmap=1G!4G splash"}
    remove(machine)
    assert machine.exists(f"/boot/efi/{addon.FOLDER}/quiet.addon.efi")


# Trials -----------------------------------------------------------------------------------------------------


def begin(machine: FakeMachine, **options: bool) -> Change:
    prepared = prepare_trial(machine, survey_of(machine), Request(GIB), Options(**options))  # type: ignore[arg-type]
    carry_out_change(machine, prepared)
    return prepared


def starts(machine: FakeMachine, words: str = "memmap=1G!4G") -> None:
    (machine.root / boot_efi.ONE_SHOT.lstrip("/")).unlink(missing_ok=True)
    put(machine, "/proc/cmdline", f"{LINE} {words}\n")
    put(machine, "/proc/stat", "cpu 0\nbtime 4000000000\n")


def test_a_trial_is_an_entry_that_starts_the_same_image(machine: FakeMachine) -> None:
    put(machine, f"/boot/efi/{addon.FOLDER}/splash.addon.efi", pe.addon("splash"))
    before = content(machine)
    begin(machine, nokaslr=True)
    after = content(machine)
    assert after.keys() - before.keys() == {TRIAL[1:], "etc/kernel/cmdline"}
    assert after["etc/kernel/cmdline"].decode() == f"{ROOT}\n"
    lines = after[TRIAL[1:]].decode().splitlines()
    assert lines[3:] == [f"efi /EFI/Linux/{ID}-{RELEASE}.efi", f"options {LINE} memmap=1G!4G nokaslr"]
    state = trial.state(machine)
    assert state is not None
    assert (state.words, state.chosen) == (("memmap=1G!4G", "nokaslr"), True)
    starts(machine, "memmap=1G!4G nokaslr splash")
    carry_out_change(machine, prepare_confirm(machine))
    assert line(machine) == "memmap=1G!4G nokaslr"
    assert not machine.exists(TRIAL)
    starts(machine, "splash")
    remove(machine)
    assert content(machine).keys() == before.keys()


def test_a_trial_is_given_up(machine: FakeMachine) -> None:
    before = content(machine)
    begin(machine)
    starts(machine, "")
    carry_out_change(machine, prepare_abandon(machine))
    assert content(machine) == before


def test_a_trial_without_systemd_boot_or_with_secure_boot_is_refused(tmp_path: Path) -> None:
    machine = by_firmware(tmp_path / "a")
    with pytest.raises(EmupmemError, match="a trial needs systemd-boot"):
        begin(machine)
    machine = signing(tmp_path / "b")
    with pytest.raises(EmupmemError, match="with Secure Boot on, a unified kernel image takes no words"):
        begin(machine)


# Secure Boot ------------------------------------------------------------------------------------------------

DER = bytes(range(64)) * 4
PEM = f"-----BEGIN CERTIFICATE-----\n{base64.encodebytes(DER).decode()}-----END CERTIFICATE-----\n"
KEY, CERTIFICATE = "/var/lib/sbctl/keys/db/db.key", "/var/lib/sbctl/keys/db/db.pem"


def signing(root: Path) -> FakeMachine:
    """Secure Boot is on, with a key of sbctl's."""
    machine = knows_trials(root)
    put(machine, boot_efi.SECURE_BOOT, b"\x06\0\0\0\x01")
    put(machine, boot_efi.TRUSTED, b"\x27\0\0\0list of certificates" + DER + b"more")
    put(machine, KEY, "-----BEGIN PRIVATE KEY-----\n")
    put(machine, CERTIFICATE, PEM)
    script(machine, "sbsign", "#!/bin/sh\n")
    return machine


def test_with_secure_boot_the_addon_is_signed(tmp_path: Path) -> None:
    machine = signing(tmp_path)
    before = content(machine)
    obstacles.refuse_machine(machine)
    apply(machine)
    file = machine.pe_file(ADDON)
    assert file is not None
    assert (file.line, file.signed) == ("memmap=1G!4G", True)
    put(machine, ADDON, pe.addon("memmap=1G!4G"))
    apply(machine)
    file = machine.pe_file(ADDON)
    assert file is not None
    assert file.signed, "one from before Secure Boot was switched on is signed"
    remove(machine)
    assert content(machine) == before


def test_the_settings_of_kernel_install_name_the_key_and_the_tool(tmp_path: Path) -> None:
    machine = signing(tmp_path)
    put(machine, "/k.pem", "key")
    put(machine, "/c.pem", PEM)
    settings = "[UKI]\nSecureBootPrivateKey=/k.pem\nSecureBootCertificate=/c.pem # ours\n"
    put(machine, "/etc/kernel/uki.conf", f"{settings}SecureBootSigningTool=systemd-sbsign\n")
    with pytest.raises(EmupmemError, match="systemd-sbsign is not installed to sign"):
        obstacles.refuse_machine(machine)
    put(machine, "/usr/lib/systemd/systemd-sbsign", "")
    program(machine, "ukify", UKIFY + 'pathlib.Path(ROOT, "said").write_text(" ".join(sys.argv))\n')
    apply(machine)
    said = (machine.root / "said").read_text()
    assert "--signtool=systemd-sbsign --secureboot-private-key=/k.pem --secureboot-certificate=/c.pem" in said


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        (KEY, "there is no key of its owner's"),
        (boot_efi.TRUSTED, f"{CERTIFICATE} is not enrolled"),
        ("/sbin/sbsign", "neither systemd-sbsign nor sbsign is installed"),
        ("damaged", f"{CERTIFICATE} is not enrolled"),
        ("pkcs11", "pkcs11:token=x is no file that can be read"),
    ],
)
def test_with_secure_boot_and_no_usable_key_it_is_refused(tmp_path: Path, gone: str, why: str) -> None:
    machine = signing(tmp_path)
    if gone == "damaged":
        put(machine, CERTIFICATE, PEM.replace("A", "!"))
    elif gone == "pkcs11":
        (machine.root / KEY.lstrip("/")).unlink()
        put(
            machine,
            "/etc/kernel/uki.conf",
            "[UKI]\nSecureBootPrivateKey=pkcs11:token=x\nSecureBootCertificate=/c\n",
        )
    else:
        (machine.root / gone.lstrip("/")).unlink()
    before = content(machine)
    with pytest.raises(EmupmemError, match=why) as told:
        obstacles.refuse_machine(machine)
    assert "add memmap=SIZE!START to /etc/kernel/cmdline; then sudo kernel-install add-all" in told.value.hint
    with pytest.raises(EmupmemError, match=why):
        apply(machine)
    assert content(machine) == before


# Elsewhere --------------------------------------------------------------------------------------------------


def test_an_archive_tells_the_same(machine: FakeMachine) -> None:
    for name in ("apply", "remove"):
        (apply if name == "apply" else remove)(machine)
        here = look.findings_of(machine)
        there = look.findings_of(collected.Collected(gather.gather_machine(machine).archive))
        for finding in ("loader", "source", "firmware", "kernel"):
            (one,) = [f for f in here if f.name == finding]
            (other,) = [f for f in there if f.name == finding]
            assert one.status == other.status
            assert (
                one.evidence.replace(ID, "") == other.evidence.replace("0" * 31 + "1", "")
                or ID in one.evidence
            )


def test_an_archive_has_what_makes_images_of_new_kernels(machine: FakeMachine) -> None:
    put(
        machine,
        "/etc/mkinitcpio.d/linux.preset",
        'PRESETS=(default)\ndefault_uki="/efi/EFI/Linux/linux.efi"\n',
    )
    program(machine, "mkinitcpio", "")
    assert bls_sources.mkinitcpio_makes_images(machine)
    assert bls_sources.mkinitcpio_makes_images(collected.Collected(gather.gather_machine(machine).archive))


def test_without_root_nothing_is_said_of_what_cannot_be_seen(machine: FakeMachine) -> None:
    machine.root_user = False
    for name in (IMAGE, f"/boot/efi/EFI/Linux/{ID}-6.1.0-9.efi"):
        (machine.root / name.lstrip("/")).unlink()
    assert obstacles.first(machine) is None, "the partition is closed to us, and root may see more"
    with pytest.raises(EmupmemError, match="shown to root only"):
        detect.of(machine).standing(machine)


def test_a_signal_takes_the_addon_back(machine: FakeMachine) -> None:
    before = content(machine)
    prepared = prepare_apply(machine, survey_of(machine), Request(GIB), Options())

    def stop(step: str) -> None:
        if step == "generated":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(EmupmemError, match="stopped by SIGTERM"):
        carry_out_change(machine, prepared, stop)
    assert content(machine) == before
    assert not machine.exists("/boot/efi/loader/addons")
