# SPDX-License-Identifier: Apache-2.0
"""The word that keeps kmem away from soft reserved memory: it comes with the first range and goes with the last one.

On GRUB's machine in a folder; the other loaders are in test_loader.py, the real ones in tests/vm/test_vm_memory.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.boot import kernel as boot_kernel
from emupmem.boot import obstacles
from emupmem.boot.change import Change
from emupmem.boot.grub import dropin
from emupmem.boot.loader import Options
from emupmem.boot.prepare import added_words, prepare_apply, prepare_confirm, prepare_remove, prepare_trial
from emupmem.boot.transaction import carry_out_change
from emupmem.device.boot_unit import recorded_kinds
from emupmem.doctor import kernel as doctor_kernel
from emupmem.doctor.finding import Eye
from emupmem.kernel.cmdline import WITHOUT_KMEM, parse_command_line
from emupmem.model import GIB, DeviceKind, ModuleState, Presence, Request
from tests.boot.test_change import FOUND, default
from tests.boot.test_trial import boots
from tests.boot.test_trial import prepare as knows_trials
from tests.fake import RELEASE, STOCK, FakeMachine, build, menu, put

DAX, MEMORY, PMEM = DeviceKind.DAX, DeviceKind.MEMORY, DeviceKind.PMEM
ITEM = "1G%4G-1+0xefffffff"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = build(tmp_path)
    put(made, "/usr/local/bin/emupmem", "")
    return made


def apply(machine: FakeMachine, kind: DeviceKind, size: int = GIB, **options: bool) -> Change:
    prepared = prepare_apply(machine, FOUND, Request(size, kind=kind), Options(**options))  # type: ignore[arg-type]
    if prepared.needed:
        carry_out_change(machine, prepared)
    return prepared


def remove(machine: FakeMachine, *items: str) -> None:
    carry_out_change(machine, prepare_remove(machine, items))


def linux(words: str) -> bytes:
    """The defaults with these words in GRUB_CMDLINE_LINUX."""
    return STOCK.replace(b'LINUX=""', f'LINUX="{words}"'.encode())


@pytest.mark.parametrize("kind", [DAX, MEMORY])
def test_it_comes_with_the_first_range_and_goes_with_the_last_one(
    machine: FakeMachine, kind: DeviceKind
) -> None:
    apply(machine, kind)
    assert default(machine) == linux(f"memmap={ITEM} {WITHOUT_KMEM}")
    assert menu(machine).count(WITHOUT_KMEM) == 3
    assert not apply(machine, kind).needed
    apply(machine, PMEM, add=True)
    assert default(machine) == linux(f"memmap={ITEM},1G!5G {WITHOUT_KMEM}")
    remove(machine, "1G!5G")
    assert default(machine) == linux(f"memmap={ITEM} {WITHOUT_KMEM}")
    apply(machine, PMEM, add=True)
    remove(machine, ITEM)
    assert default(machine) == linux("memmap=1G!5G")
    remove(machine)
    assert default(machine) == STOCK
    assert added_words(machine) == ()


def test_pmem_in_its_place_needs_it_no_more(machine: FakeMachine) -> None:
    apply(machine, DAX)
    apply(machine, PMEM, replace=True)
    assert default(machine) == linux("memmap=1G!4G")
    assert added_words(machine) == ()
    apply(machine, MEMORY, replace=True)
    assert default(machine) == linux(f"memmap={ITEM} {WITHOUT_KMEM}")
    assert added_words(machine) == (WITHOUT_KMEM,)


def test_an_earlier_reservation_gets_it_by_the_same_apply(machine: FakeMachine) -> None:
    apply(machine, DAX)
    text = default(machine).replace(f" {WITHOUT_KMEM}".encode(), b"")
    put(machine, "/etc/default/grub", text.decode())
    made = apply(machine, DAX)
    assert made.boot_needed
    assert default(machine) == linux(f"memmap={ITEM} {WITHOUT_KMEM}")


@pytest.mark.parametrize("own", ["modprobe.blacklist=other,kmem", "modprobe.blacklist=nouveau"])
def test_a_word_of_somebody_else_stays_beside_it(machine: FakeMachine, own: str) -> None:
    put(machine, "/etc/default/grub", linux(own).decode())
    apply(machine, DAX)
    assert default(machine) == linux(f"{own} memmap={ITEM} {WITHOUT_KMEM}")
    remove(machine)
    assert default(machine) == linux(own)


def test_the_same_word_of_somebody_else_stays_as_well(machine: FakeMachine) -> None:
    put(machine, "/etc/default/grub", linux(WITHOUT_KMEM).decode())
    apply(machine, DAX)
    assert default(machine) == linux(f"{WITHOUT_KMEM} memmap={ITEM}")
    assert added_words(machine) == ()
    apply(machine, PMEM, replace=True)
    assert default(machine) == linux(f"{WITHOUT_KMEM} memmap=1G!4G")
    apply(machine, DAX, replace=True)
    remove(machine)
    assert default(machine) == linux(WITHOUT_KMEM)


def test_it_goes_where_the_former_bytes_are_not_to_be_had(machine: FakeMachine) -> None:
    apply(machine, DAX, nokaslr=True)
    put(machine, "/etc/default/grub", default(machine).replace(b'LINUX="', b'LINUX="quiet ').decode())
    remove(machine)
    assert default(machine) == linux("quiet")


def test_in_a_drop_in_of_our_own(machine: FakeMachine) -> None:
    cloud = 'GRUB_CMDLINE_LINUX="console=ttyS0"\n'
    put(machine, "/etc/default/grub.d/50-cloud.cfg", cloud)
    apply(machine, DAX)
    assert f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap={ITEM} {WITHOUT_KMEM}"' in machine.peek(
        dropin.NAME
    )
    apply(machine, PMEM, add=True)
    assert f"memmap={ITEM},1G!5G {WITHOUT_KMEM}" in machine.peek(dropin.NAME)
    apply(machine, PMEM, replace=True)
    assert WITHOUT_KMEM not in machine.peek(dropin.NAME)
    remove(machine)
    assert not machine.exists(dropin.NAME)
    assert default(machine) == STOCK


def test_a_trial_has_it_and_a_confirm_brings_the_unit(machine: FakeMachine) -> None:
    knows_trials(machine)
    prepared = prepare_trial(machine, FOUND, Request(GIB, kind=DAX), Options())
    carry_out_change(machine, prepared)
    assert prepared.trial == (f"memmap={ITEM}", WITHOUT_KMEM)
    assert recorded_kinds(machine) == {}
    boots(machine, " ".join(prepared.trial))
    carry_out_change(machine, prepare_confirm(machine))
    assert default(machine) == linux(f"memmap={ITEM} {WITHOUT_KMEM}")
    assert recorded_kinds(machine) == {(4 * GIB, GIB): DAX}
    assert added_words(machine) == (WITHOUT_KMEM,)
    remove(machine)
    assert default(machine) == STOCK


def test_our_word_is_not_taken_for_a_blockade(machine: FakeMachine) -> None:
    put(machine, f"/lib/modules/{RELEASE}/modules.dep", "kernel/dax_hmem.ko:\nkernel/kmem.ko:\n")

    def kmem(words: str) -> ModuleState:
        return boot_kernel.module_states(machine, RELEASE, parse_command_line(words), MEMORY)[-1]

    assert kmem(f"memmap={ITEM} {WITHOUT_KMEM}").presence is Presence.AVAILABLE
    for words in (
        WITHOUT_KMEM,
        f"memmap={ITEM} module_blacklist=kmem",
        f"memmap={ITEM} modprobe.blacklist=x,kmem",
    ):
        assert kmem(words).presence is Presence.BLOCKED


@pytest.mark.parametrize(
    ("kind", "word"),
    [(DAX, "initcall_blacklist=dax_kmem_init"), (MEMORY, "memhp_default_state=online_movable")],
)
def test_a_kernel_that_has_kmem_built_in_needs_another_word(
    machine: FakeMachine, kind: DeviceKind, word: str
) -> None:
    config = "".join(
        f"CONFIG_{o}=y\n"
        for o in ("EFI_SOFT_RESERVE", "DEV_DAX", "DEV_DAX_HMEM", "DEV_DAX_KMEM", "MEMORY_HOTPLUG")
    )
    put(machine, f"/boot/config-{RELEASE}", config)
    (told,) = [w for w in obstacles.refuse_machine(machine, kind) if "kmem is built into" in w]
    assert told.endswith(f"the kernel command line needs {word} as well")
    apply(machine, kind)
    eye = Eye(machine, 0, target=obstacles.target(machine), line=parse_command_line(f"memmap={ITEM}"))
    found = doctor_kernel.look_at_modules(eye)
    assert (found.status, found.fix) == ("warn", f"add {word} to the kernel command line")
    put(machine, "/etc/default/grub", linux(word).decode())
    assert not [w for w in obstacles.refuse_machine(machine, kind) if "kmem" in w]
    put(machine, f"/boot/config-{RELEASE}", config.replace("KMEM=y", "KMEM=m"))
    put(machine, "/etc/default/grub", STOCK.decode())
    assert not [w for w in obstacles.refuse_machine(machine, kind) if "kmem" in w]
