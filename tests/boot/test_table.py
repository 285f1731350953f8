# SPDX-License-Identifier: Apache-2.0
"""README's table of boot loaders says of each how it is tested: here are the tests, and they are of that kind."""

from __future__ import annotations

import re

import pytest

from tests import PROJECT

KINDS = {"booted: ": "vm", "real tool in a chroot: ": "scenario", "stand-in after ": ""}
"""How a clause of a row begins, and the folder of its tests; stand-ins are used in all of them."""

# By the beginning of a row: a test for each of its clauses, as folder/module.function.
PROOFS = {
    "GRUB with `grub.cfg`": (
        "vm/test_vm.test_suggest_apply_reboot_verify_mount_remove",
        "scenario/test_grub.test_bookworm_there_and_back",
    ),
    "systemd-boot": (
        "vm/test_vm_loader.test_systemd_boot_from_suggest_to_remove",
        "scenario/test_systemd_boot.test_trixie_there_and_back",
    ),
    "unified kernel images": (
        "vm/test_vm_uki.test_images_of_6_12",
        "scenario/test_uki.test_the_real_dracut_builds_no_reservation_into_its_images",
        "scenario/test_uki.test_images_by_mkinitcpio_as_on_arch",
    ),
    "GRUB with BLS entries": (
        "vm/test_vm_bls.test_a_trial_by_grub_is_taken_once_and_the_entries_as_it_reads_them",
        "scenario/test_grub.test_a_trial_of_bls_entries_by_the_real_grub_editenv",
        "boot/test_grub_bls.test_a_new_kernel_carries_it_and_after_remove_none_does",
    ),
    "openSUSE": ("boot/test_loader.test_a_new_kernel_of_opensuse_carries_it_and_after_remove_none_does",),
    "rpm-ostree": ("boot/test_rpm_ostree.test_a_trial_pins_what_runs_and_says_that_nothing_is_forgotten",),
    "Pop!_OS": ("boot/test_generators.test_a_kernel_update_keeps_it_and_after_remove_nothing_of_it_is_left",),
    "CachyOS": ("boot/test_generators.test_a_new_kernel_gets_it_and_after_remove_none_does",),
    "Proxmox": ("boot/test_proxmox.test_a_new_kernel_gets_it_and_after_remove_none_does",),
    "Limine": ("boot/test_limine.test_a_new_kernel_carries_it_and_after_remove_none_does",),
    "rEFInd": ("scenario/test_systemd_boot.test_the_real_mkrlconf_leaves_the_reservation_in_its_file",),
}


def rows() -> dict[str, list[str]]:
    """The clauses of each row, by its first cell."""
    text = (PROJECT / "README.md").read_text()
    found = re.search(r"^\| The machine boots with .*\n\|[- |]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in found[1].splitlines()]
    return {
        first: re.split("; (?=booted|real tool|stand-in)", second.rstrip(" |")) for first, second in cells
    }


def test_each_row_says_how_it_is_tested_and_nothing_else() -> None:
    changed = {row: clauses for row, clauses in rows().items() if not clauses[0].startswith("not changed: ")}
    assert len(changed) == len(PROOFS)
    for row, clauses in changed.items():
        (proofs,) = [p for start, p in PROOFS.items() if row.startswith(start)]
        assert len(proofs) == len(clauses), row
        for clause, proof in zip(clauses, proofs, strict=True):
            (folder,) = [f for start, f in KINDS.items() if clause.startswith(start)]
            assert proof.startswith(f"{folder}/" if folder else ("boot/", "scenario/")), clause


@pytest.mark.parametrize("proof", [p for proofs in PROOFS.values() for p in proofs])
def test_that_test_is_there(proof: str) -> None:
    module, _, name = proof.partition(".")
    text = (PROJECT / f"tests/{module}.py").read_text()
    found = re.search(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def {name}\(", text, re.MULTILINE)
    assert found is not None
    assert ("vm(image=" in found[1]) == module.startswith("vm/")
    assert "xfail" not in found[1]


def test_the_versions_of_stand_ins_are_those_in_their_heads() -> None:
    heads = "".join(p.read_text() for p in (PROJECT / "tests").glob("*/test_*.py"))
    heads += (PROJECT / "tests/boot/generators.py").read_text()
    clauses = [c for all_of_it in rows().values() for c in all_of_it if c.startswith("stand-in after ")]
    named = [v for c in clauses for v in re.findall(r"\b(?:[0-9a-f]{7}|\d{4}-\d\d-\d\d|\d+\.\d[\w.-]*)\b", c)]
    assert len(named) > 10
    assert [v for v in named if v not in heads] == []
