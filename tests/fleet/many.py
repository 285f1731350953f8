# SPDX-License-Identifier: Apache-2.0
"""Twenty hosts that start in as many ways: some whose loader emupmem tells, others that another tool owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tests.boot import test_detect
from tests.fake import FakeMachine
from tests.scenario import test_grub, test_systemd_boot, test_uki
from tests.scenario.machine import Host, Scenario

EFIVARS = "sys/firmware/efi/efivars"

TOLD = ("debian12", "debian13", "fedora", "uki", "refind")
"""Those that emupmem can tell."""
OWNED = {
    name.replace(" ", "-"): case
    for name, case in test_detect.LIVE.items()
    if "," not in name
    and name not in ("refind", "refind without a name", "uki", "limine without KERNEL_CMDLINE")
    # what tells of these is the kernel's own: its mounts, and which loader it says started it
    and name not in ("zfsbootmenu", "microos")
}
"""Those whose entries another tool writes, each with the reason and the way that `apply` gives."""


@contextmanager
def hosts(folder: Path) -> Iterator[dict[str, Scenario]]:
    """All of them, started."""
    with ExitStack() as stack:

        def play(host: Host) -> Scenario:
            return stack.enter_context(Scenario(host))

        found = {
            "debian12": test_grub.bookworm(play),
            "debian13": test_systemd_boot.trixie(play),
            "fedora": play(test_grub.FEDORA),
            "uki": test_uki.installed(play),
            "refind": play(test_systemd_boot.REFIND),
        }
        found["refind"].must("mkrlconf")
        for name, (build, _, _) in OWNED.items():
            machine = FakeMachine(folder / name)
            build(machine)
            found[name] = play(host_of(machine.root))
            found[name].must("rm", "-rf", "/etc/default/grub", "/boot/grub")
        yield found


def host_of(root: Path) -> Host:
    """A machine in a folder, as a host to play."""
    files = {str(f.relative_to(root)): f for f in sorted(root.rglob("*")) if f.is_file()}
    texts: Mapping[str, bytes] = {name: file.read_bytes() for name, file in files.items()}
    variables = {n.rpartition("/")[2]: text[4:] for n, text in texts.items() if n.startswith(EFIVARS)}
    os_release = texts.get("etc/os-release")
    firmware = any(name.startswith("sys/firmware/efi") for name in texts)
    special = ("proc/", "sys/", "sbin/", "etc/os-release")
    return replace(
        test_grub.BOOKWORM,
        cmdline=texts["proc/cmdline"].decode().strip(),
        efi=variables if firmware else None,
        os_release=os_release.decode() if os_release else None,
        removed=("update-grub", "update-grub2", "grub-mkconfig"),
        programs={n.removeprefix("sbin/"): t for n, t in texts.items() if n.startswith("sbin/")},
        files={
            **test_grub.BOOKWORM.files,
            **{f"/{name}": text for name, text in texts.items() if not name.startswith(special)},
        },
    )
