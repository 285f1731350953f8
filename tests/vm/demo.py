# SPDX-License-Identifier: Apache-2.0
"""Show what a user sees, live, in a virtual machine: `python -m tests.vm.demo`.

A Debian 12 guest with 6 GiB and BIOS is booted three times through its own GRUB: reserve a
gigabyte, use it as a DAX file system, give it back.  Exits with 1 when anything went wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tests.vm.image import image, to_stderr
from tests.vm.machine import LostMachine, Machine

SUITE = "bookworm"

# Each is a boot.  The demo stops at the first command that fails.
BOOTS = (
    (
        "emupmem suggest --size 1G",
        "emupmem apply --size 1G --yes",
    ),
    (
        "emupmem verify",
        "emupmem mount /dev/pmem0 /mnt/pmem0",
        "grep pmem /proc/mounts",
        "echo 'hello, persistent memory' >/mnt/pmem0/hello",
        "sync /mnt/pmem0/hello",
        "cat /mnt/pmem0/hello",
        "df -h /mnt/pmem0",
        "emupmem umount /mnt/pmem0",
        "emupmem remove --yes",
    ),
    (
        "emupmem verify",
        "test ! -e /dev/pmem0",
        "! grep memmap= /proc/cmdline",
    ),
)


def script(commands: tuple[str, ...]) -> str:
    """Return a bash script that shows each command as typed at a prompt, then runs it."""
    # Of GRUB's generator scripts only those that this guest needs: each costs seconds without KVM.
    unneeded = "chmod -x /etc/grub.d/20_linux_xen /etc/grub.d/30_* 2>/dev/null || true"
    lines = ["set -e", "export COLUMNS=100", unneeded]
    for command in commands:
        lines += [f"cat <<'END'\nroot@guest:~# {command}\nEND", command]
    return "\n".join(lines) + "\n"


def demo(say: Callable[[str], None]) -> bool:
    """Run all boots, passing on what the guest says; return whether every command succeeded."""
    guest = image(SUITE, "bios", to_stderr)
    with Machine(guest, memory="6G") as machine:
        for number, commands in enumerate(BOOTS, 1):
            say(f"--- boot {number}: firmware, GRUB, Linux ---\n")
            result = machine.boot(script(commands), live=say)
            say(f"--- up, done and off in {result.seconds:.0f} s ---\n\n")
            if result.status != 0:
                say(f"the last command failed with status {result.status}\n")
                return False
    return True


def main() -> int:
    """Run the demo and say how long it took."""
    start = time.monotonic()
    try:
        good = demo(_say)
    except LostMachine as error:
        print(error, file=sys.stderr)
        good = False
    print(f"{'All as planned' if good else 'NOT as planned'}, {time.monotonic() - start:.0f} s in all.")
    return 0 if good else 1


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
