# SPDX-License-Identifier: Apache-2.0
"""Scenarios: whole machines played in a second, with the real programs of their boot loaders.

How to write one:

1. Choose a tree (`tree.RECIPES`): "grub" is Debian 12 with GRUB, "systemd" Debian 13 with systemd-boot, ukify …
2. Say what the machine is in a `machine.Host`: command line, release, UEFI variables, files, programs. Take
   `kernel.files(RELEASE)` for a kernel. Where a real program cannot serve, put a stand-in into `programs`, written
   after a version that you name, with its unpleasant habits.
3. Take the fixture `play` and mark the module `pytest.mark.scenario`: `machine = play(HOST)`.
4. Let the real programs make the rest (`machine.must("update-grub2")`), keep `before = machine.snapshot()`.
5. Act: `machine.emupmem("apply", "--size", "1G", "--yes")`, other programs by `machine.run`, a reboot by `boot`.
6. Judge by what the loader would read (`machine.read`), and by `diff(before, machine.snapshot()) == {}`.
7. Try something by hand: `python -m tests.scenario.tree grub` builds a tree; a test with `-s` shows what is printed.

What stays this host's: the processor (systemd-detect-virt --vm sees its hypervisor), the clock, free memory.
There are no block devices, no services and no mounts by the machine's own programs (no right to).
"""
