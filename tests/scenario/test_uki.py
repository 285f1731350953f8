# SPDX-License-Identifier: Apache-2.0
"""Machines whose kernels are unified images, made by the real ukify and kernel-install 257 of Debian 13."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from tests import pe
from tests.scenario import kernel
from tests.scenario.machine import Host, Play, Scenario, diff
from tests.scenario.test_systemd_boot import (
    BLS,
    ID,
    NEXT,
    RELEASE,
    ROOT,
    SYSTEMD_BOOT,
    TRIXIE,
    entry,
    options,
)

pytestmark = pytest.mark.scenario

LINE = f"{ROOT} ro quiet {BLS}"
ESP = "/boot/efi"
ADDON = f"{ESP}/loader/addons/emupmem.addon.efi"
CMDLINE = "/etc/kernel/cmdline"


def image(release: str) -> str:
    return f"{ESP}/EFI/Linux/{ID}-{release}.efi"


def kernels(*releases: str) -> dict[str, str | bytes]:
    files = {n: c for r in releases for n, c in kernel.files(r).items()}
    return files | {f"/boot/vmlinuz-{r}": pe.efi_kernel(r) for r in releases}


UKI = replace(
    TRIXIE,
    cmdline=LINE,
    efi={
        **(TRIXIE.efi or {}),
        "LoaderEntrySelected": f"{ID}-{RELEASE}.efi",
        "StubInfo": "systemd-stub 257.13-1~deb13u1",
        "StubImageIdentifier": f"\\EFI\\Linux\\{ID}-{RELEASE}.efi",
        "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": b"\0",
    },
    files={**kernels(RELEASE, NEXT), "/etc/kernel/install.conf": "layout=uki\nuki_generator=ukify\n"},
)
FIRMWARE = {n: v for n, v in (UKI.efi or {}).items() if not n.startswith("Loader")}


def installed(play: Play, host: Host = UKI) -> Scenario:
    """Debian with layout=uki: its kernels are images in EFI/Linux."""
    machine = play(host)
    machine.must("bootctl", "install", "--make-entry-directory=no", "--no-variables")
    add(machine, host.release)
    return machine


def add(machine: Scenario, release: str) -> None:
    """What the kernel's package does."""
    machine.must("kernel-install", "add", release, f"/boot/vmlinuz-{release}", f"/boot/initrd.img-{release}")


def words(machine: Scenario, name: str) -> list[str]:
    """The words in an image or an addon, as ukify itself reads them."""
    shown = json.loads(machine.must("ukify", "inspect", name, "--json=short"))
    return shown[".cmdline"]["text"].split() if ".cmdline" in shown else []


def given(machine: Scenario, release: str) -> list[str]:
    """What the stub hands to its kernel (load_all_addons, systemd 257): its own words, then those of the addons."""
    there = machine.snapshot([f"{ESP}/loader/addons"])
    addons = sorted(n for n in there if n.endswith(".addon.efi"))
    return [w for name in (image(release), *addons) for w in words(machine, name)]


@pytest.mark.parametrize("efi", [UKI.efi, FIRMWARE], ids=["systemd-boot", "firmware"])
def test_there_and_back(play: Play, efi: dict[str, str | bytes]) -> None:
    machine = installed(play, replace(UKI, efi=efi))
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert given(machine, RELEASE) == [*LINE.split(), "memmap=1G!4G"]
    assert machine.read(CMDLINE) == f"{ROOT} ro quiet\n", "else new images would have this boot's words"
    changed = {n for n in diff(before, machine.snapshot()) if not n.endswith("/addons")}
    assert changed == {ADDON, CMDLINE}
    shown = machine.emupmem("verify", "--json")
    assert shown.status == 3, shown
    assert [c["status"] for c in shown.json["checks"]][:3] == ["ok", "ok", "pending"], shown
    done = machine.emupmem("apply", "--size", "1G", "--add", "--yes")
    assert done.status == 0, done
    assert words(machine, ADDON) == ["memmap=1G!4G,1G!5G"]
    done = machine.emupmem("apply", "--size", "2G", "--replace", "--nokaslr", "--yes")
    assert done.status == 0, done
    assert words(machine, ADDON) == ["memmap=2G!4G", "nokaslr"]
    assert machine.emupmem("apply", "--size", "2G", "--nokaslr", "--check").status == 0
    machine.boot(f"{LINE} memmap=2G!4G nokaslr")
    assert machine.emupmem("apply", "--size", "2G", "--check").status == 0
    machine.boot(LINE)
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}
    assert machine.processes() == []


def test_new_kernels_have_it_until_it_is_removed(play: Play) -> None:
    machine = installed(play)
    before = machine.snapshot()
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    machine.boot(f"{LINE} memmap=1G!4G")
    add(machine, NEXT)
    assert given(machine, NEXT) == [*LINE.split(), "memmap=1G!4G"], "once, though this boot has it"
    assert machine.emupmem("verify", "--json").json["checks"][1]["status"] == "ok"
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    machine.must("kernel-install", "remove", NEXT)
    add(machine, NEXT)
    assert given(machine, NEXT) == LINE.split(), "while this boot still has it"
    machine.must("kernel-install", "remove", NEXT)
    assert set(diff(before, machine.snapshot())) <= {CMDLINE}, "which stays while this boot has the words"


def test_the_real_dracut_builds_no_reservation_into_its_images(play: Play) -> None:
    """Their words are those of its settings, else what it finds out itself, and never those of this boot."""
    machine = installed(play)
    settings = f"uefi=yes\nhostonly_cmdline=yes\nkernel_cmdline='{ROOT} ro'\ndracutmodules=bash\n"
    machine.write("/etc/dracut.conf.d/mine.conf", settings)
    machine.write(f"/boot/config-{NEXT}", machine.read(f"/boot/config-{NEXT}") + "CONFIG_BLK_DEV_INITRD=y\n")
    before = machine.snapshot()

    def dracut() -> list[str]:
        quick = ("--force", "--no-kernel", "--no-compress", "--nostrip", "--nohardlink")
        kernel = ("--kver", NEXT, "--kernel-image", f"/boot/vmlinuz-{NEXT}")
        done = machine.run("dracut", *quick, *kernel, image(NEXT), timeout=600)
        assert done.status == 0, done
        return given(machine, NEXT)

    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    machine.boot(f"{LINE} memmap=1G!4G")
    assert dracut() == [ROOT, "ro", "memmap=1G!4G"]
    machine.write("/etc/dracut.conf.d/mine.conf", settings.replace("kernel_cmdline", "#"))
    assert dracut() == ["memmap=1G!4G"], "by the addon"
    machine.write("/etc/dracut.conf.d/mine.conf", settings)
    assert machine.emupmem("remove", "--yes").status == 0
    assert dracut() == [ROOT, "ro"], "while this boot still has it"
    machine.remove(image(NEXT))
    assert set(diff(before, machine.snapshot())) <= {CMDLINE}


# After mkinitcpio of 2026-04-29 (fc8137c), `-P`; left out are presets' own --cmdline, the initial disk itself, hooks,
# fallbacks, splash images and signing. Its habits: /etc/kernel/cmdline, else the vendor's, and behind it all of
# /etc/cmdline.d; without any of them this boot's words; lines that begin with # are left out; an image is
# replaced as a whole, with what is in it.
MKINITCPIO = r"""#!/bin/bash
[ "$*" = -P ] || { echo "==> ERROR: invalid option" >&2; exit 1; }
for preset in /etc/mkinitcpio.d/*.preset; do
  . "$preset"
  files=()
  for file in /etc/kernel/cmdline /usr/lib/kernel/cmdline; do [ -f "$file" ] && files+=("$file") && break; done
  for file in /etc/cmdline.d/*.conf; do [ -f "$file" ] && files+=("$file"); done
  [ "${#files[@]}" = 0 ] && { echo "==> WARNING: Reusing /proc/cmdline"; files=(/proc/cmdline); }
  line="$(grep -ha -- '^[^#]' "${files[@]}" | tr -s '\n' ' ')"
  ukify build --linux="$ALL_kver" --initrd="$initrd" --cmdline="$line" --uname="$uname" --output="$default_uki" >&2
done
"""
ARCH_IMAGE = f"{ESP}/EFI/Linux/arch-linux.efi"


@pytest.mark.parametrize(
    "sources",
    [
        {CMDLINE: f"# mine\n{ROOT} ro\nquiet\n"},
        {"/etc/cmdline.d/root.conf": f"{ROOT} ro quiet\n"},
        {},
        {
            CMDLINE: f"{ROOT} ro quiet\n",
            f"{ESP}/loader/entries/arch.conf": f"title Arch Linux\nlinux /vmlinuz-linux\noptions {ROOT} ro quiet\n",
        },
    ],
    ids=["kernel-cmdline", "cmdline.d", "none", "entry-of-before"],
)
def test_images_by_mkinitcpio_as_on_arch(sources: dict[str, str], play: Play) -> None:
    preset = f"ALL_kver=/boot/vmlinuz-{RELEASE}\ninitrd=/boot/initrd.img-{RELEASE}\nuname={RELEASE}\n"
    line = f"{ROOT} ro quiet"
    host = replace(
        UKI,
        cmdline=line,
        os_release='NAME="Arch Linux"\nID=arch\n',
        efi={
            **(UKI.efi or {}),
            "LoaderEntrySelected": "arch-linux.efi",
            "StubImageIdentifier": "\\EFI\\Linux\\arch-linux.efi",
        },
        files={
            **kernels(RELEASE),
            **sources,
            "/etc/mkinitcpio.d/linux.preset": f"{preset}default_uki={ARCH_IMAGE}\n",
        },
        programs={"mkinitcpio": MKINITCPIO},
    )
    machine = play(host)
    machine.must("bootctl", "install", "--make-entry-directory=no", "--no-variables")
    machine.must("mkinitcpio", "-P")
    before = machine.snapshot()
    assert words(machine, ARCH_IMAGE) == line.split()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert words(machine, ADDON) == ["memmap=1G!4G"]
    machine.boot(f"{line} memmap=1G!4G")
    machine.must("mkinitcpio", "-P")
    assert words(machine, ARCH_IMAGE) == line.split(), "it is in the addon, and not twice"
    assert machine.emupmem("apply", "--size", "1G", "--check").status == 0
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    machine.must("mkinitcpio", "-P")
    assert words(machine, ARCH_IMAGE) == line.split(), "while this boot still has it"
    machine.boot(line)
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    assert machine.emupmem("remove", "--yes").status == 0
    made = {ARCH_IMAGE} if sources else {ARCH_IMAGE, CMDLINE}
    assert set(diff(before, machine.snapshot())) <= made, "CMDLINE stayed while the boot had the words"


def test_the_doctor_and_suggest_know_it(play: Play) -> None:
    machine = installed(play)
    found = {f["name"]: f for f in machine.emupmem("doctor", "--json").json["findings"]}
    assert found["loader"]["status"] == "ok", found
    assert found["loader"]["evidence"].startswith("systemd-boot 257"), found
    assert f"in {ESP}/EFI/Linux" in found["loader"]["evidence"]
    assert found["firmware"]["status"] == "ok"
    assert RELEASE in found["kernel"]["evidence"]
    assert "sudo emupmem apply" in machine.emupmem("suggest", "--size", "1G").stdout
    assert "memmap=1G!4G" in machine.emupmem("apply", "--size", "1G", "--dry-run").stdout


@pytest.mark.parametrize("missing", ["ukify", "stub"])
def test_without_what_makes_addons_it_is_refused(play: Play, missing: str) -> None:
    machine = installed(play)
    if missing == "ukify":
        machine.remove("/usr/bin/ukify")
    else:
        machine.remove("/usr/lib/systemd/boot/efi/addonx64.efi.stub")
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert (done.status, len(done.stderr.splitlines())) == (1, 2), done
    assert "apt-get install systemd-" in done.stderr
    assert diff(before, machine.snapshot()) == {}
    assert "sudo emupmem apply" not in machine.emupmem("suggest", "--size", "1G").stdout


def test_an_older_stub_is_refused_with_its_own_way(play: Play) -> None:
    machine = installed(play)
    machine.write(image(RELEASE), pe.unified(RELEASE, LINE, "systemd-stub 252.39-1~deb12u1"))
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 1, done
    assert "systemd-stub 252.39-1~deb12u1" in done.stderr
    assert "add memmap=1G!4G to /etc/kernel/cmdline; then sudo kernel-install add-all" in done.stderr
    assert diff(before, machine.snapshot()) == {}


def test_images_of_another_system_are_not_given_it(play: Play) -> None:
    machine = installed(play)
    machine.write(f"{ESP}/EFI/Linux/other.efi", pe.unified("6.9.0", "root=LABEL=other"))
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 1, done
    assert f"{ESP}/EFI/Linux/other.efi starts another system" in done.stderr
    assert "memmap=1G!4G" in done.stderr


def test_plain_entries_beside_images_are_kept_in_step(play: Play) -> None:
    """A machine that came to images later: its older kernel is still started by a plain entry."""
    machine = play(replace(TRIXIE, files={**TRIXIE.files, **kernels(NEXT)}))
    machine.must("bootctl", "install", "--make-entry-directory=auto", "--no-variables")
    add(machine, RELEASE)
    machine.write("/etc/kernel/install.conf", "layout=uki\nuki_generator=ukify\n")
    add(machine, NEXT)
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert options(machine, RELEASE) == [*LINE.split(), "memmap=1G!4G"]
    assert given(machine, NEXT) == [*LINE.split(), "memmap=1G!4G"]
    assert machine.read(CMDLINE) == f"{ROOT} ro quiet\n"
    machine.must("kernel-install", "remove", NEXT)
    add(machine, NEXT)
    assert given(machine, NEXT) == [*LINE.split(), "memmap=1G!4G"]
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}
    assert entry(RELEASE) in before


def test_what_is_built_in_is_told_and_not_doubled(play: Play) -> None:
    machine = installed(play, replace(UKI, files={**UKI.files, CMDLINE: f"{ROOT} ro quiet memmap=1G!4G\n"}))
    before = machine.snapshot()
    assert "memmap=1G!4G" in words(machine, image(RELEASE))
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert "Already set up" in done.stdout
    assert diff(before, machine.snapshot()) == {}
    done = machine.emupmem("apply", "--size", "2G", "--replace", "--yes")
    assert done.status == 1, done
    assert f"{image(RELEASE)} has memmap=1G!4G built into it" in done.stderr
    assert diff(before, machine.snapshot()) == {}
    done = machine.emupmem("remove", "--yes")
    assert done.status == 3, "the next start still has it"
    assert f"{image(RELEASE)} still has memmap=1G!4G built into it" in done.stderr
    assert "no entry reserves memory" not in done.stdout
    assert machine.read(CMDLINE) == f"{ROOT} ro quiet\n"
    add(machine, RELEASE)
    assert words(machine, image(RELEASE)) == LINE.split()


def test_a_trial_is_chosen_by_the_real_bootctl(play: Play) -> None:
    machine = installed(play)
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes", "--trial")
    assert done.status == 0, done
    (chosen,) = [n for p, n in machine.snapshot(["/sys/firmware/efi/efivars"]).items() if "OneShot" in p]
    assert chosen.data[4:].decode("utf-16-le") == "emupmem-trial.conf\0"
    listed = {e["id"]: e for e in json.loads(machine.must("bootctl", "list", "--json=short"))}
    trial = listed["emupmem-trial.conf"]
    assert trial["options"].split() == [*LINE.split(), "memmap=1G!4G"]
    assert trial["efi"].replace("//", "/").endswith(f"EFI/Linux/{ID}-{RELEASE}.efi"), trial
    assert given(machine, RELEASE) == LINE.split()
    assert machine.emupmem("verify").status == 3
    machine.boot(f"{LINE} memmap=1G!4G")
    machine.remove(*[p for p in machine.snapshot(["/sys/firmware/efi/efivars"]) if "OneShot" in p])
    (default,) = [
        e["id"] for e in json.loads(machine.must("bootctl", "list", "--json=short")) if e["isDefault"]
    ]
    assert default == f"{ID}-{RELEASE}.efi", "the start after it takes the image as it is"
    add(machine, NEXT)
    assert given(machine, NEXT) == LINE.split(), "nothing of the trial's in new images"
    machine.must("kernel-install", "remove", NEXT)
    machine.boot(LINE)
    done = machine.emupmem("abandon", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}


def test_a_tree(play: Play) -> None:
    machine = installed(play)
    before = machine.snapshot()
    machine.must("mkdir", "/tree")
    machine.must("cp", "-a", "/boot", "/etc", "/tree/")
    machine.must("mkdir", "-p", "/tree/usr/lib/systemd")
    machine.must("cp", "-a", "/usr/lib/systemd/boot", "/tree/usr/lib/systemd/")
    done = machine.emupmem(
        "apply", "--size", "1G", "--yes", "--root", "/tree", "--from", "/var/lib/scenario/dmesg"
    )
    assert done.status == 0, done
    assert words(machine, f"/tree{ADDON}") == ["memmap=1G!4G"]
    done = machine.emupmem("remove", "--yes", "--root", "/tree")
    assert done.status == 0, done
    machine.must("diff", "-r", "/boot", "/tree/boot")
    assert diff(before, machine.snapshot()) == {}


# Secure Boot ------------------------------------------------------------------------------------------------

KEY, CERTIFICATE = "/etc/kernel/secure-boot-private-key.pem", "/etc/kernel/secure-boot-certificate.pem"
DB = "/sys/firmware/efi/efivars/db-d719b2cb-3d3a-4596-a3bc-dad00e67656f"


def test_with_secure_boot_the_addon_is_signed_with_an_enrolled_key(play: Play) -> None:
    secure = {n: b"\1" if n.startswith("SecureBoot") else v for n, v in (UKI.efi or {}).items()}
    machine = installed(play, replace(UKI, efi=secure))
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 1, done
    assert "Secure Boot is on, and an addon must be signed" in done.stderr
    assert "add memmap=1G!4G to /etc/kernel/cmdline; then sudo kernel-install add-all" in done.stderr
    assert diff(before, machine.snapshot()) == {}

    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=scenario/", "-days", "3650")
    machine.must("openssl", *new, "-keyout", KEY, "-out", CERTIFICATE)
    assert f"{CERTIFICATE} is not enrolled" in machine.emupmem("apply", "--size", "1G", "--yes").stderr
    machine.must("openssl", "x509", "-in", CERTIFICATE, "-outform", "DER", "-out", "/tmp/der")
    der = base64.b64decode(machine.must("base64", "/tmp/der"))
    machine.write(DB, b"\x27\0\0\0" + b"\xa1" * 44 + der)  # attributes, the head of a list, a certificate
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert "Signature verification OK" in machine.must("sbverify", "--cert", CERTIFICATE, ADDON)
    assert given(machine, RELEASE) == [*LINE.split(), "memmap=1G!4G"]
    done = machine.emupmem("apply", "--size", "1G", "--yes", "--trial")
    assert done.status == 1, done
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}


def test_the_reader_agrees_with_pefile(play: Play) -> None:
    """What emupmem reads in a real image, a real addon and systemd's own programs is what ukify's library reads."""
    machine = installed(play)
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    files = [image(RELEASE), ADDON, SYSTEMD_BOOT, "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"]
    machine.write("/tmp/pefile-texts", PEFILE)
    theirs = json.loads(machine.must("python3", "/tmp/pefile-texts", *files))
    machine.write("/tmp/our-texts", OURS)
    environment = {"PYTHONPATH": "/opt/project"}
    done = machine.run("/opt/emupmem/bin/python", "/tmp/our-texts", *files, environment=environment)
    assert done.json == theirs, done.stderr


PEFILE = """
import json, pefile, sys
found = []
for name in sys.argv[1:]:
    with pefile.PE(name, fast_load=True) as pe:
        texts = {s.Name.rstrip(b"\\0").decode(): s.get_data(length=s.Misc_VirtualSize) for s in pe.sections}
    wanted = (".cmdline", ".uname", ".osrel", ".sdmagic")
    found.append({n: t.partition(b"\\0")[0].decode() for n, t in texts.items() if n in wanted})
print(json.dumps(found, sort_keys=True))
"""
OURS = """
import json, sys
from emupmem.system.pe import read_pe
found = [dict(read_pe(open(name, "rb")).texts) for name in sys.argv[1:]]
print(json.dumps(found, sort_keys=True))
"""
