# SPDX-License-Identifier: Apache-2.0
"""Programs that write systemd-boot's entries from a source of their own: their next run keeps what was changed.

Whole trees are compared. The programs are stand-ins (see generators.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from emupmem.boot import detect, loader, obstacles, prepare
from emupmem.boot.loader import Owned
from emupmem.doctor import look
from emupmem.model import GIB, EmupmemError, Request
from emupmem.system.machine import Machine
from tests import fake
from tests.boot.test_loader import (
    CACHY_CONFIG,
    CACHY_WINDOWS,
    MACHINES,
    POP_CONFIG,
    POP_OPTIONS,
    RECOVERY,
    apply,
    boots_by_default,
    cachyos,
    pop,
    program,
    remove,
    survey_of,
)
from tests.cli.runner import Run
from tests.cli.test_cli import log as log  # the fixture
from tests.crash import worlds
from tests.fake import FakeMachine, put
from tests.scenario import kernel

pytestmark = pytest.mark.slow  # the inner loop has each loader in test_loader.py

CONFIG = "/etc/kernelstub/configuration"
RESERVED = "memmap=1G!4G"
NEW = "7.1.0-3"
Tree = dict[str, tuple[str, int, bytes]]


def tree(machine: Machine) -> Tree:
    """All files but our backups, their log and the machine's kernel log: kind, mode, content."""
    found = worlds.look(machine.root)
    return {
        n: (node.kind, node.mode, node.data)
        for n, node in found.items()
        if not n.startswith(("var", "fail", "sbin/dmesg")) and n
    }


def applied_to_tree(machine: FakeMachine, program: str, run: Run, log: str) -> Tree:
    """Apply to the machine as a tree, whose programs lie in /usr/bin and are not run; all files of before."""
    (machine.root / "usr/bin").mkdir(parents=True)
    (machine.root / f"sbin/{program}").rename(machine.root / f"usr/bin/{program}")
    before = tree(machine)
    done = run("apply", "--size", "1G", "--yes", "--root", str(machine.root), "--from", log)
    assert done.status == 0, done
    return before


def changed(before: Tree, after: Tree) -> set[str]:
    return {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}


def entry(machine: Machine, name: str) -> str:
    return machine.peek(f"/boot/efi/loader/entries/{name}.conf")


def updates(machine: FakeMachine, release: str = NEW) -> None:
    """A new kernel, as its package and the hook of the generator install it."""
    put(machine, f"/boot/vmlinuz-{release}", kernel.image(release))
    put(machine, f"/boot/initrd.img-{release}", f"initrd of {release}\n")
    done = machine.output("kernelstub", "--verbose", "--preserve-live-mode")
    assert done is not None
    assert done.status == 0, done


# kernelstub --------------------------------------------------------------------------------------------------


def test_only_the_configuration_and_the_two_entries_change(tmp_path: Path) -> None:
    machine = pop(tmp_path)
    before = tree(machine)
    inodes = {n: o.inode for n, o in worlds.look(machine.root).items() if n.startswith("boot/efi/EFI")}
    apply(machine)
    entries = "boot/efi/loader/entries"
    wanted = {CONFIG[1:], f"{entries}/Pop_OS-current.conf", f"{entries}/Pop_OS-oldkern.conf"}
    assert changed(before, tree(machine)) == wanted
    assert json.loads(machine.peek(CONFIG))["user"]["kernel_options"] == [*POP_OPTIONS, RESERVED]
    assert f"{entry(machine, 'Recovery-1A')}\n" == RECOVERY
    assert {
        n: o.inode for n, o in worlds.look(machine.root).items() if n.startswith("boot/efi/EFI")
    } == inodes
    made = tree(machine)
    assert machine.output("kernelstub") is not None
    assert changed(made, tree(machine)) == set(), "its own run writes the same bytes"
    remove(machine)
    assert tree(machine) == before


def test_a_kernel_update_keeps_it_and_after_remove_nothing_of_it_is_left(tmp_path: Path) -> None:
    machine, other = pop(tmp_path / "a"), pop(tmp_path / "b")
    apply(machine, nokaslr=True)
    apply(machine, 2 * GIB, replace=True)
    updates(machine)
    for name in ("Pop_OS-current", "Pop_OS-oldkern"):
        assert entry(machine, name).endswith(f"root=UUID=0 ro {' '.join(POP_OPTIONS)} memmap=2G!4G nokaslr")
    boots_by_default(machine, NEW)
    remove(machine)
    updates(other)
    assert tree(machine) == tree(other)
    updates(machine, "7.2.0-1")
    assert not any(b"memmap" in data for n, (_, _, data) in tree(machine).items() if not n.startswith("sbin"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(POP_CONFIG, indent=2),
        json.dumps(POP_CONFIG, indent=2) + "\n",
        json.dumps(POP_CONFIG, indent=8),
        json.dumps(POP_CONFIG),
        json.dumps(POP_CONFIG, separators=(",", " :  ")).replace('["quiet"', '[ "quiet"'),
        json.dumps({k: POP_CONFIG[k] for k in ("user", "default")}, indent=2, ensure_ascii=False),
        json.dumps({**POP_CONFIG, "user": {**POP_CONFIG["user"], "kernel_options": "quiet  a=b"}}, indent=2),
        json.dumps({**POP_CONFIG, "user": {**POP_CONFIG["user"], "kernel_options": ["a=b", "", "quiet"]}}),
        json.dumps({**POP_CONFIG, "user": {**POP_CONFIG["user"], "kernel_options": []}}, indent=2),
    ],
)
def test_whatever_it_looks_like_other_settings_stay_and_the_words_come_back(
    text: str, tmp_path: Path
) -> None:
    machine = pop(tmp_path)
    put(machine, CONFIG, text)
    old = json.loads(text)
    apply(machine)
    new = json.loads(machine.peek(CONFIG))
    assert RESERVED in new["user"]["kernel_options"]
    assert type(new["user"]["kernel_options"]) is type(old["user"]["kernel_options"])
    new["user"]["kernel_options"] = old["user"]["kernel_options"]
    assert new == old
    remove(machine)
    assert json.loads(machine.peek(CONFIG)) == old
    if " :  " not in text and '""' not in text:
        assert machine.read(CONFIG) == text.encode()


def test_what_kernelstub_itself_added_is_known_and_goes(tmp_path: Path) -> None:
    machine = pop(tmp_path)
    before = tree(machine)
    assert machine.output("kernelstub", "-a", "memmap=64K#0x1000 memmap=1G!4G") is not None
    assert apply(machine) is None, "it is as asked"
    remove(machine)
    assert machine.output("kernelstub") is not None
    options = json.loads(machine.peek(CONFIG))["user"]["kernel_options"]
    assert options == [*POP_OPTIONS, "memmap=64K#0x1000"]
    assert changed(before, tree(machine)) == {
        n for n in before if n.endswith(("configuration", "rent.conf", "kern.conf"))
    }


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        ("start", "kernelstub cannot read its configuration: KeyError"),
        ("end", "kernelstub cannot read its configuration: Kernel Image Path"),
        ("wrong", "kernelstub reads other words there: .*memmmap=1G!4G"),
        ("silent", "kernelstub reads other words there: none"),
    ],
)
def test_a_kernelstub_that_reads_something_else_is_the_end_of_it(
    failure: str, problem: str, tmp_path: Path
) -> None:
    machine = pop(tmp_path)
    if failure == "silent":
        program(machine, "kernelstub", "")
    before = tree(machine)
    put(machine, "/fail", failure)
    with pytest.raises(EmupmemError, match=problem) as caught:
        apply(machine)
    assert "the old configuration is back, nothing is changed" in caught.value.hint
    assert tree(machine) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"user": {}}',
        '{"default": {"kernel_options": []}}',
        '{"user": {"kernel_options": [1]}}',
    ],
)
def test_a_configuration_that_it_could_not_use_is_refused(text: str, tmp_path: Path) -> None:
    machine = pop(tmp_path)
    put(machine, CONFIG, text)
    before = tree(machine)
    with pytest.raises(EmupmemError, match="has no kernel_options of the user's") as caught:
        obstacles.refuse_machine(machine)
    assert "sudo kernelstub --loader --manage-only" in caught.value.hint
    with pytest.raises(EmupmemError):
        prepare.prepare_remove(machine)
    assert tree(machine) == before


def test_without_its_program_its_machine_is_left_alone(tmp_path: Path) -> None:
    machine = pop(tmp_path)
    (machine.root / "sbin/kernelstub").unlink()
    assert isinstance(detect.of(machine), Owned)


def test_all_commands_speak_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    machine = pop(tmp_path / "machine")
    fake.running(monkeypatch.setattr, machine)
    done = run("suggest", "--size", "1G")
    assert "sudo emupmem apply --size 1G" in done.out, done
    found = {f.name: f for f in look.findings_of(machine)}
    assert (
        found["loader"].evidence
        == "systemd-boot 255.4-1ubuntu8, 2 entries of this system in /boot/efi/loader/entries, by kernelstub"
    )
    assert f"new kernels take {CONFIG}" in found["source"].evidence
    refused = run("apply", "--size", "1G", "--yes", "--trial")
    assert "a trial is not known for kernelstub" in refused.err
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert CONFIG in done.out
    done = run("verify", "--wait", "0")
    assert f"memmap=1G!4G in {CONFIG}" in done.out, done
    assert run("remove", "--yes").status == 0


def test_a_tree_is_changed_as_kernelstub_would(tmp_path: Path, run: Run, log: str) -> None:
    machine = pop(tmp_path / "tree")
    before = applied_to_tree(machine, "kernelstub", run, log)
    assert len(changed(before, tree(machine))) == 3
    made = tree(machine)
    (machine.root / "usr/bin/kernelstub").rename(machine.root / "sbin/kernelstub")
    assert machine.output("kernelstub") is not None
    (machine.root / "sbin/kernelstub").rename(machine.root / "usr/bin/kernelstub")
    assert tree(machine) == made
    assert run("remove", "--yes", "--root", str(machine.root)).status == 0
    assert tree(machine) == before


# sdboot-manage -----------------------------------------------------------------------------------------------

SETTINGS = "/etc/sdboot-manage.conf"
DROPIN = "/etc/sdboot-manage.conf.d/zz-emupmem.conf"
OURS = """# added by emupmem
LINUX_OPTIONS="$LINUX_OPTIONS memmap=1G!4G"
LINUX_FALLBACK_OPTIONS="$LINUX_FALLBACK_OPTIONS memmap=1G!4G"
"""
WORDS = "root=UUID=0 rw zswap.enabled=0 nowatchdog quiet splash"


def entries(machine: Machine) -> dict[str, str]:
    """The words of each entry that starts a Linux."""
    folder = "/boot/loader/entries"
    texts = {n: machine.peek(f"{folder}/{n}") for n in machine.names(folder)}
    found = {n.removesuffix(".conf"): re.search(r"^options (.*)$", t, re.MULTILINE) for n, t in texts.items()}
    return {n: " ".join(f[1].split()) for n, f in found.items() if f is not None}


def manages(machine: FakeMachine, *kernels: str, verb: str = "autogen") -> None:
    """New kernels, as pacman's hook installs them."""
    for name in kernels:
        put(machine, f"/boot/vmlinuz-{name}", kernel.image(name))
    done = machine.output("sdboot-manage", verb)
    assert done is not None
    assert done.status == 0, done


def test_two_lines_and_the_entries_change(tmp_path: Path) -> None:
    machine = cachyos(tmp_path, fallback=True)
    before = tree(machine)
    apply(machine)
    assert machine.read(SETTINGS) == (CACHY_CONFIG + OURS).encode()
    assert len(changed(before, tree(machine))) == 5
    assert entries(machine)["linux-lts"] == f"{WORDS} memmap=1G!4G"
    assert entries(machine)["linux-lts-fallback"] == "root=UUID=0 rw memmap=1G!4G"
    made = tree(machine)
    manages(machine, verb="gen")
    manages(machine, verb="remove")
    assert tree(machine) == made, "its own run writes the same bytes"
    remove(machine)
    assert tree(machine) == before


@pytest.mark.parametrize("name", [n for n in MACHINES if n.startswith("sdboot-manage")])
def test_a_new_kernel_gets_it_and_after_remove_none_does(name: str, tmp_path: Path) -> None:
    machine, other = (MACHINES[name][0](tmp_path / n) for n in "ab")
    apply(machine, nokaslr=True)
    apply(machine, 2 * GIB, replace=True)
    assert all(line.endswith(" memmap=2G!4G nokaslr") for line in entries(machine).values())
    manages(machine, "linux-zen")
    assert entries(machine)["linux-zen"] == f"{WORDS} memmap=2G!4G nokaslr"
    assert all("memmap=2G!4G" in line for line in entries(machine).values())
    remove(machine)
    manages(other, "linux-zen")
    assert tree(machine).keys() == tree(other).keys()
    assert entries(machine) == entries(other)
    assert machine.read(SETTINGS) == other.read(SETTINGS)
    manages(machine, "linux-new")
    assert not any("memmap" in line for line in entries(machine).values())


@pytest.mark.parametrize("failure", ["start", "half", "end", "wrong", "interrupt"])
@pytest.mark.parametrize("verb", ["apply", "remove"])
def test_an_sdboot_manage_that_fails_leaves_nothing(failure: str, verb: str, tmp_path: Path) -> None:
    machine = cachyos(tmp_path, fallback=True)
    if verb == "remove":
        apply(machine)
    put(machine, "/boot/vmlinuz-linux-zen", kernel.image(NEW))  # it has no entry yet
    before = tree(machine)
    put(machine, "/fail", failure)
    if (failure, verb) == ("wrong", "remove"):
        return
    with pytest.raises(EmupmemError) as caught:
        {"apply": apply, "remove": remove}[verb](machine)
    assert "the old configuration is back, nothing is changed" in caught.value.hint
    assert tree(machine) == before


def test_where_it_deletes_all_entries_first_it_is_not_run(tmp_path: Path) -> None:
    machine = cachyos(tmp_path, CACHY_CONFIG.replace('REMOVE_EXISTING="no"', "REMOVE_EXISTING=Yes"))
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    assert prepared.steps.commands == ()
    assert any("REMOVE_EXISTING=yes lets it delete all entries" in w for w in prepared.warnings)
    apply(machine)
    assert f"{machine.peek('/boot/loader/entries/windows.conf')}\n" == CACHY_WINDOWS
    assert entries(machine)["linux-cachyos"] == f"{WORDS} memmap=1G!4G"


def test_where_an_entry_was_edited_by_hand_gen_is_not_run(tmp_path: Path) -> None:
    """It would write the entry anew, without the words that only it has."""
    machine = cachyos(tmp_path)
    name = "/boot/loader/entries/linux-lts.conf"
    put(machine, name, machine.peek(name).replace(" splash", " splash mine=1") + "\n")
    before = tree(machine)
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    assert prepared.steps.commands == ()
    assert any(
        f"it would take words out of {name} that its settings do not have" in w for w in prepared.warnings
    )
    apply(machine)
    assert entries(machine)["linux-lts"] == f"{WORDS} mine=1 memmap=1G!4G"
    assert entries(machine)["linux-cachyos"] == f"{WORDS} memmap=1G!4G"
    remove(machine)
    assert tree(machine) == before


def test_a_drop_in_that_sets_the_options_gets_one_behind_it(tmp_path: Path) -> None:
    machine = cachyos(tmp_path)
    put(machine, "/etc/sdboot-manage.conf.d/10-mine.conf", "LINUX_OPTIONS='quiet mine=1' # all\n")
    manages(machine, verb="gen")
    before = tree(machine)
    apply(machine)
    assert machine.peek(DROPIN) == OURS.strip()
    assert entries(machine)["linux-lts"] == "root=UUID=0 rw quiet mine=1 memmap=1G!4G"
    assert prepare.prepare_remove(machine).before.where == DROPIN
    remove(machine)
    assert tree(machine) == before


@pytest.mark.parametrize(
    "config",
    [
        "",
        "LINUX_OPTIONS=quiet",
        "LINUX_OPTIONS='quiet' # mine\nLINUX_FALLBACK_OPTIONS=\"$LINUX_OPTIONS x=1\"\n",
        'export LINUX_OPTIONS="quiet"\n  LINUX_OPTIONS="${LINUX_OPTIONS} y=2"\n',
        "X=$(echo 1)\nif true; then Y=2; fi\n",
        'LINUX_OPTIONS="quiet memmap=64K#0x1000"\n\xff\n#',
    ],
)
def test_every_other_byte_stays(config: str, tmp_path: Path) -> None:
    machine = cachyos(tmp_path, f"REMOVE_EXISTING=no\nOVERWRITE_EXISTING=yes\n{config}")
    before = tree(machine)
    text = machine.read(SETTINGS)
    apply(machine)
    assert text is not None
    assert (machine.read(SETTINGS) or b"").startswith(text)
    assert all("memmap=1G!4G" in line for line in entries(machine).values())
    remove(machine)
    assert tree(machine) == before


def test_words_that_a_person_added_are_known_and_go(tmp_path: Path) -> None:
    config = (
        CACHY_CONFIG.replace('splash"', 'splash memmap=1G!4G"') + "LINUX_FALLBACK_OPTIONS='memmap=1G!4G'\n"
    )
    machine = cachyos(tmp_path, config)
    assert apply(machine) is None, "it is as asked"
    apply(machine, 2 * GIB, replace=True)
    assert entries(machine)["linux-lts"] == f"{WORDS} memmap=2G!4G"
    remove(machine)
    assert machine.peek(SETTINGS) == f"{CACHY_CONFIG}LINUX_FALLBACK_OPTIONS=''"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('LINUX_OPTIONS="a$(echo b)"', "sh reads LINUX_OPTIONS as “ab”, its plain lines say"),
        ('LINUX_OPTIONS="a\nb"', "sh reads LINUX_OPTIONS as “a b”|sh reads LINUX_OPTIONS as “a\nb”"),
        ("if", r"sdboot-manage\.conf:9: sh cannot read this file"),
    ],
)
def test_what_is_no_plain_assignment_is_refused(line: str, problem: str, tmp_path: Path) -> None:
    machine = cachyos(tmp_path)
    put(machine, SETTINGS, f"{CACHY_CONFIG}{line}\n")
    before = tree(machine)
    with pytest.raises(EmupmemError, match=problem) as caught:
        apply(machine)
    assert caught.value.hint
    assert tree(machine) == before


def test_a_tree_of_cachyos(tmp_path: Path, run: Run, log: str) -> None:
    machine = cachyos(tmp_path / "tree")
    before = applied_to_tree(machine, "sdboot-manage", run, log)
    assert machine.read(SETTINGS) == (CACHY_CONFIG + OURS).encode()
    assert entries(machine)["linux-lts"] == f"{WORDS} memmap=1G!4G"
    assert run("remove", "--yes", "--root", str(machine.root)).status == 0
    assert tree(machine) == before


def test_all_commands_speak_of_sdboot_manage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    machine = cachyos(tmp_path / "machine")
    fake.running(monkeypatch.setattr, machine)
    assert "sudo emupmem apply --size 1G" in run("suggest", "--size", "1G").out
    found = {f.name: f for f in look.findings_of(machine)}
    assert found["loader"].evidence.endswith(
        "2 entries of this system in /boot/loader/entries, by sdboot-manage"
    )
    assert f"new kernels take {SETTINGS}" in found["source"].evidence
    assert "a trial is not known for sdboot-manage" in run("apply", "--size", "1G", "--yes", "--trial").err
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert "sdboot-manage gen" in done.out + done.err
    assert f"memmap=1G!4G in {SETTINGS}" in run("verify", "--wait", "0").out
    assert run("remove", "--yes").status == 0


def test_words_that_a_person_repeats_in_our_line_stay(tmp_path: Path) -> None:
    machine = cachyos(tmp_path)
    apply(machine)
    file = "/etc/sdboot-manage.conf"
    more = "console=tty0 console=ttyS0 console=tty0 quiet"
    put(machine, file, machine.text(file).replace('memmap=1G!4G"', f'memmap=1G!4G {more}"'))
    machine.output("sdboot-manage", "gen")
    remove(machine)
    assert "memmap" not in machine.text(file)
    assert machine.text(file).count(more) == 2
