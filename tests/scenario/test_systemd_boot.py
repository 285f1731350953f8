import pytest

from tests.scenario import kernel
from tests.scenario.machine import Host, Play, diff

pytestmark = pytest.mark.scenario

RELEASE, NEXT = "6.12.48+deb13-amd64", "6.12.57+deb13-amd64"
ROOT = "root=UUID=e0b0eed5-0000-4000-8000-000000000001"
ID = "0123456789abcdef0123456789abcdef"
TRIXIE = Host(
    tree="systemd",
    cmdline=f"initrd=\\{ID}\\{RELEASE}\\initrd.img-{RELEASE} {ROOT} ro quiet systemd.machine_id={ID}",
    release=RELEASE,
    efi={"LoaderInfo": "systemd-boot 257.8-1~deb13u2", "LoaderEntrySelected": f"{ID}-{RELEASE}.conf"},
    esp="/boot/efi",
    files={
        **kernel.files(RELEASE), **kernel.files(NEXT),
        "/boot/efi/loader/loader.conf": "timeout 3\n",
        "/boot/efi/EFI/systemd/systemd-bootx64.efi": b"MZ",
    },
)


def test_trixie(play):
    s = play(TRIXIE)
    print(s.run("kernel-install", "-v", "add", RELEASE, f"/boot/vmlinuz-{RELEASE}"))
    print(s.run("kernel-install", "inspect", f"/boot/vmlinuz-{RELEASE}"))
    print(s.run("bootctl", "install", "--make-entry-directory=auto", "--no-variables"))
    print(s.run("kernel-install", "-v", "add", RELEASE, f"/boot/vmlinuz-{RELEASE}", f"/boot/initrd.img-{RELEASE}"))
    print(s.run("sh", "-c", "find /boot /etc/kernel; cat /boot/efi/loader/entries/*; which bootctl"))
    before = s.snapshot()
    print(s.run("bootctl", "list", "--json=short"))
    print(s.run("bootctl", "status"))
    print(s.emupmem("doctor"))
    print(s.emupmem("apply", "--size", "1G", "--yes"))
    print(s.run("grep", "-rn", "memmap", "/boot", "/etc/kernel"))
    print(s.emupmem("verify"))
    print(s.run("kernel-install", "add", NEXT, f"/boot/vmlinuz-{NEXT}", f"/boot/initrd.img-{NEXT}"))
    print(s.run("grep", "-rn", "memmap", "/boot", "/etc/kernel"))
    print(s.emupmem("remove", "--yes"))
    print(s.must("kernel-install", "remove", NEXT))
    print(diff(before, s.snapshot()))
    print(s.processes())
