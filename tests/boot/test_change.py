# SPDX-License-Identifier: Apache-2.0
"""Apply and remove on a machine in a folder: what they do, and that nothing that fails leaves a trace."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import emupmem
from emupmem.boot import transaction
from emupmem.boot.change import Change
from emupmem.boot.grub import defaults
from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_apply, prepare_remove
from emupmem.boot.transaction import carry_out_change
from emupmem.model import GIB, UNCHANGED, EmupmemError, Request
from emupmem.planner import survey
from emupmem.system import backups, files, lock
from emupmem.system.machine import Machine
from tests.fake import GENERATOR, LOG, STOCK, FakeMachine, build, leftovers, menu, put, script

FOUND = survey.of_log(LOG.encode(), "test")


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return build(tmp_path)


def default(machine: FakeMachine) -> bytes:
    return (machine.root / "etc/default/grub").read_bytes()


def apply(machine: FakeMachine, size: int = 16 * GIB, count: int = 1, **options: object) -> Change:
    """Plan and carry out, as the command does."""
    prepared = prepare_apply(machine, FOUND, Request(size, count), Options(**options))  # type: ignore[arg-type]
    if prepared.needed:
        carry_out_change(machine, prepared)
    return prepared


def remove(machine: FakeMachine, *items: str) -> Change:
    prepared = prepare_remove(machine, items)
    if prepared.needed:
        carry_out_change(machine, prepared)
    return prepared


def test_apply_changes_one_value_and_every_entry_carries_it(machine: FakeMachine) -> None:
    made = apply(machine)
    assert default(machine) == STOCK.replace(b'LINUX=""', b'LINUX="memmap=16G!4G"')
    assert made.memmap == "memmap=16G!4G"
    assert '+GRUB_CMDLINE_LINUX="memmap=16G!4G"' in made.diff
    assert menu(machine).count("memmap=16G!4G") == 3
    assert leftovers(machine) == []


def test_the_menu_stays_in_its_language(machine: FakeMachine) -> None:
    generator = GENERATOR.replace(
        "echo 'set default=\"0\"'", 'echo \'set default="0"\'; echo "set lang=${LANG%.*}"'
    )
    script(machine, "update-grub2", generator)
    put(machine, "/boot/grub/grub.cfg", "set lang=de_DE\n" + menu(machine))
    apply(machine)
    assert "set lang=de_DE" in menu(machine)


def test_the_default_variable_spares_recovery_entries(machine: FakeMachine) -> None:
    apply(machine, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    assert menu(machine).count("memmap=16G!4G") == 2
    assert "single \n" in menu(machine)


def test_again_changes_nothing(machine: FakeMachine) -> None:
    apply(machine)
    assert not apply(machine).needed


def test_a_different_reservation_needs_a_word(machine: FakeMachine) -> None:
    apply(machine, GIB)
    with pytest.raises(EmupmemError) as caught:
        apply(machine, 2 * GIB)
    assert caught.value.message == "there is a different reservation already: memmap=1G!4G"
    assert "--replace" in caught.value.hint
    assert apply(machine, 2 * GIB, replace=True).memmap == "memmap=2G!4G"
    assert apply(machine, GIB, add=True).memmap == "memmap=2G!4G,1G!6G"
    assert menu(machine).count("memmap=2G!4G,1G!6G") == 3


def test_replace_may_move_to_the_other_variable(machine: FakeMachine) -> None:
    apply(machine, GIB)
    apply(machine, GIB, replace=True, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    assert b'GRUB_CMDLINE_LINUX=""' in default(machine)
    assert b'DEFAULT="quiet splash memmap=1G!4G"' in default(machine)


def test_remove_gives_the_former_bytes_back(machine: FakeMachine) -> None:
    apply(machine)
    assert remove(machine).memmap == ""
    assert default(machine) == STOCK
    assert "memmap" not in menu(machine)


@pytest.mark.parametrize(
    "text",
    [
        b"GRUB_TIMEOUT=1\n",  # no variable
        b"GRUB_TIMEOUT=1",  # and no last newline
        b"GRUB_CMDLINE_LINUX=quiet\n",  # unquoted
        b"GRUB_CMDLINE_LINUX='a b'  # c\nexport GRUB_CMDLINE_LINUX\n",
        b"\n\n#\n# x\n\nGRUB_CMDLINE_LINUX=\n\n",
        b'GRUB_CMDLINE_LINUX="memmap=64K\\\\\\$0x18690000 a"\n',
    ],
)
def test_remove_undoes_apply_to_the_byte(tmp_path: Path, text: bytes) -> None:
    machine = build(tmp_path, text)
    apply(machine)
    assert menu(machine).count("memmap=16G!4G") == 3
    remove(machine)
    assert default(machine) == text


def test_remove_goes_back_through_replaced_reservations(machine: FakeMachine) -> None:
    apply(machine, GIB)
    apply(machine, 2 * GIB, replace=True, nokaslr=True)
    assert b"memmap=2G!4G nokaslr" in default(machine)
    remove(machine)
    assert default(machine) == STOCK


def test_a_change_of_somebody_else_in_between_stays(machine: FakeMachine) -> None:
    apply(machine, GIB)
    put(machine, "/etc/default/grub", default(machine).replace(b"TIMEOUT=5", b"TIMEOUT=1"))
    remove(machine)
    assert default(machine) == STOCK.replace(b"TIMEOUT=5", b"TIMEOUT=1")


def test_a_change_of_our_own_line_in_between_stays(machine: FakeMachine) -> None:
    apply(machine, GIB)
    put(machine, "/etc/default/grub", default(machine).replace(b"memmap=1G!4G", b"memmap=1G!4G iommu=pt"))
    remove(machine)
    assert default(machine) == STOCK.replace(b'LINUX=""', b'LINUX="iommu=pt"')


def test_single_items_are_removed_by_name(machine: FakeMachine) -> None:
    apply(machine, GIB, 2)
    assert remove(machine, "1G!4G").memmap == "memmap=1G!5G"
    with pytest.raises(EmupmemError, match="there is no reservation 9G!9G") as caught:
        remove(machine, "9G!9G")
    assert caught.value.hint == "there are: 1G!5G"
    remove(machine, "memmap=1G!5G")
    assert default(machine) == STOCK


def test_nothing_to_remove_is_nothing_to_do(machine: FakeMachine) -> None:
    assert not remove(machine).needed


def test_the_backup_is_the_former_text(machine: FakeMachine) -> None:
    prepared = prepare_apply(machine, FOUND, Request(GIB), Options())
    outcome = carry_out_change(machine, prepared)
    assert (machine.root / outcome.backup.lstrip("/")).read_bytes() == STOCK
    assert (machine.root / "var/backups/emupmem").stat().st_mode & 0o777 == 0o700


def test_mode_link_and_attributes_stay(machine: FakeMachine) -> None:
    path = machine.root / "etc/default/grub"
    real = machine.root / "etc/grub.real"
    path.rename(real)
    path.symlink_to("../grub.real")
    real.chmod(0o640)
    os.setxattr(real, "user.note", b"mine")
    apply(machine)
    assert path.is_symlink()
    assert b"memmap=16G!4G" in real.read_bytes()
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.getxattr(real, "user.note") == b"mine"


# What fails leaves the old configuration --------------------------------------------------------------


def unchanged(machine: FakeMachine, before: str, text: bytes = STOCK) -> None:
    assert default(machine) == text
    assert menu(machine) == before
    assert leftovers(machine) == []


@pytest.mark.parametrize(
    ("generator", "words"),
    [
        (
            "#!/bin/sh\necho 'something is wrong' >&2\nexit 1\n",
            "update-grub2 failed with status 1: something is wrong",
        ),
        ("#!/bin/sh\nkill -9 $$\n", "update-grub2 failed with status -9"),
        ("#!/bin/sh\nexit 0\n", "made a menu that is not as planned"),
        ('#!/bin/sh\n: > "$(dirname $0)/../boot/grub/grub.cfg"\nexit 1\n', "failed with status 1"),
        (
            '#!/bin/sh\nrm "$(dirname $0)/../boot/grub/grub.cfg"\nexit 0\n',
            "there is no normal Linux entry in it",
        ),
        ('#!/bin/sh\nhead -c 99999 /dev/urandom > "$(dirname $0)/../boot/grub/grub.cfg"\n', "not as planned"),
        (GENERATOR.replace("$args", "${args%!*}"), "instead of memmap=16G!4G"),
        (
            GENERATOR.replace("$args", "$(echo $args | sed 's/16G!/16GB!/')"),
            "would reach the kernel as a memory limit",
        ),
    ],
)
def test_a_generator_that_fails_changes_nothing(machine: FakeMachine, generator: str, words: str) -> None:
    before = menu(machine)
    script(machine, "update-grub2", generator)
    with pytest.raises(EmupmemError, match=words) as caught:
        apply(machine)
    assert "the old configuration is back" in caught.value.hint
    unchanged(machine, before)


def test_a_generator_that_hangs_is_ended(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = menu(machine)
    monkeypatch.setattr(transaction, "GENERATOR_SECONDS", 0.5)
    script(machine, "update-grub2", "#!/bin/sh\nsleep 1000\n")
    with pytest.raises(EmupmemError, match=r"did not finish within 0\.5 seconds"):
        apply(machine)
    unchanged(machine, before)


def test_a_generator_that_hangs_is_ended_whatever_it_left_running(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = menu(machine)
    pid = machine.root / "pid"
    script(machine, "update-grub2", f"#!/bin/sh\nsetsid sleep 1000 &\necho $! > '{pid}'\nsleep 1000\n")
    for seconds in (0.5, 5, 50, 500):  # where the machine is so busy that it left nothing yet: again
        monkeypatch.setattr(transaction, "GENERATOR_SECONDS", seconds)
        with pytest.raises(EmupmemError, match=rf"did not finish within {seconds} seconds"):
            apply(machine)
        if pid.exists() and pid.read_text():
            break
    os.kill(int(pid.read_text()), signal.SIGKILL)
    unchanged(machine, before)


@pytest.mark.slow
def test_what_a_generator_left_running_is_not_waited_for(machine: FakeMachine) -> None:
    pid = machine.root / "pid"
    script(machine, "update-grub2", f"{GENERATOR}sleep 1000 &\necho $! > '{pid}'\n")
    apply(machine)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    with lock.change_lock(machine):
        assert menu(machine).count("memmap=16G!4G") == 3


@pytest.mark.slow
def test_a_generator_that_prints_without_end_is_ended(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = menu(machine)
    monkeypatch.setattr(emupmem.system.machine, "MOST_OUTPUT", 5 << 20)
    script(machine, "update-grub2", "#!/bin/sh\nyes rubbish\n")
    with pytest.raises(EmupmemError, match="update-grub2 printed more than 5 MiB and was ended"):
        apply(machine)
    unchanged(machine, before)


def test_a_default_that_cannot_be_written_is_said_once(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = menu(machine)

    def full(machine: Machine, name: str, data: bytes, mode: int = 0) -> None:
        raise EmupmemError(
            f"{name} cannot be written: No space left on device", "the disk is full", state=UNCHANGED
        )

    monkeypatch.setattr(files, "replace_file", full)
    with pytest.raises(EmupmemError, match="No space left on device") as caught:
        apply(machine)
    assert caught.value.hint == "the disk is full; the old configuration is back, nothing is changed"
    unchanged(machine, before)


def test_what_cannot_be_put_back_is_not_said_to_be_unchanged(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backups.set_aside(machine, "/boot/grub/grub.cfg")
    put(machine, "/boot/grub/grub.cfg", "torn")

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(EmupmemError, match="cannot be put back") as caught:
        backups.put_back(machine, "/boot/grub/grub.cfg")
    assert caught.value.hint == "the disk is full"


TEARS = '#!/bin/sh\n: > "$(dirname $0)/../boot/grub/grub.cfg"\nexit 1\n'


@pytest.mark.parametrize(
    ("generator", "run"),
    [("update-grub2", "update-grub2"), ("grub-mkconfig", "grub-mkconfig -o /boot/grub/grub.cfg")],
)
def test_the_menu_is_put_back_even_where_the_default_cannot_be(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, generator: str, run: str
) -> None:
    before, real = menu(machine), backups.put_back
    (machine.root / "sbin/update-grub2").unlink()
    script(machine, generator, TEARS)

    def only_the_menu(machine: Machine, name: str) -> None:
        if name == "/etc/default/grub":
            raise EmupmemError(f"{name} cannot be put back: Read-only file system")
        real(machine, name)

    monkeypatch.setattr(backups, "put_back", only_the_menu)
    with pytest.raises(EmupmemError) as caught:
        apply(machine)
    assert "not all could be put back: /etc/default/grub" in caught.value.hint
    assert caught.value.hint.endswith(f" and run {run}")
    assert menu(machine) == before


def test_all_is_put_back_where_the_generator_leaves_no_room(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, calls = menu(machine), files.replace_file, []
    script(machine, "update-grub2", TEARS)

    def once(machine: Machine, name: str, data: bytes, mode: int = 0o644) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise EmupmemError(f"{name} cannot be written: No space left on device")
        real(machine, name, data, mode)

    monkeypatch.setattr(files, "replace_file", once)
    with pytest.raises(EmupmemError) as caught:
        apply(machine)
    assert "the old configuration is back" in caught.value.hint
    unchanged(machine, before)


def test_a_torn_menu_is_not_as_asked(machine: FakeMachine) -> None:
    apply(machine, GIB)
    text = menu(machine)
    put(machine, "/boot/grub/grub.cfg", text[: text.index("initrd")])
    assert apply(machine, GIB).needed
    assert menu(machine) == text


def test_without_a_generator_nothing_is_begun(machine: FakeMachine) -> None:
    before = menu(machine)
    (machine.root / "sbin/update-grub2").unlink()
    with pytest.raises(EmupmemError, match="neither update-grub2, update-grub"):
        apply(machine)
    unchanged(machine, before)


@pytest.mark.parametrize("name", ["update-grub", "grub2-mkconfig", "grub-mkconfig"])
def test_other_generators_serve(machine: FakeMachine, name: str) -> None:
    (machine.root / "sbin/update-grub2").rename(machine.root / "sbin" / name)
    apply(machine)
    assert menu(machine).count("memmap=16G!4G") == 3


CLOUD = '# cloud\nGRUB_CMDLINE_LINUX_DEFAULT="console=tty1"\n'
OWN = "etc/default/grub.d/zz-emupmem.cfg"


def test_where_a_drop_in_overrides_a_later_one_of_ours_extends(machine: FakeMachine) -> None:
    put(machine, "/etc/default/grub.d/50-cloud.cfg", CLOUD)
    machine.output("update-grub2")
    before = menu(machine)
    made = apply(machine, GIB, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    assert default(machine) == STOCK
    assert "/etc/default/grub.d/50-cloud.cfg:2 overrides GRUB_CMDLINE_LINUX_DEFAULT" in made.warnings[-1]
    text = (machine.root / OWN).read_text()
    assert text.endswith('GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT memmap=1G!4G"\n')
    assert menu(machine).count("console=tty1 memmap=1G!4G") == 2
    assert not apply(machine, GIB, variable="GRUB_CMDLINE_LINUX_DEFAULT").needed
    with pytest.raises(EmupmemError, match="there is a different reservation already"):
        apply(machine, 2 * GIB, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    apply(machine, GIB, add=True, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    assert menu(machine).count("memmap=1G!4G,1G!5G") == 2
    remove(machine, "1G!4G")
    assert menu(machine).count("memmap=1G!5G") == 2
    remove(machine)
    assert not (machine.root / OWN).exists()
    assert menu(machine) == before


def test_the_other_variable_is_not_overridden(machine: FakeMachine) -> None:
    put(machine, "/etc/default/grub.d/50-cloud.cfg", CLOUD)
    apply(machine)
    assert menu(machine).count("memmap=16G!4G") == 3
    assert not (machine.root / OWN).exists()


def test_a_drop_in_after_ours_that_overrides_is_named(machine: FakeMachine) -> None:
    before = menu(machine)
    put(machine, "/etc/default/grub.d/zzz.cfg", CLOUD)
    with pytest.raises(EmupmemError, match=r"/etc/default/grub\.d/zzz\.cfg:2 overrides"):
        apply(machine, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    unchanged(machine, before)
    assert not (machine.root / OWN).exists()


def test_a_generator_that_fails_leaves_no_drop_in(machine: FakeMachine) -> None:
    put(machine, "/etc/default/grub.d/50-cloud.cfg", CLOUD)
    before = menu(machine)
    script(machine, "update-grub2", "#!/bin/sh\nexit 1\n")
    with pytest.raises(EmupmemError, match="failed"):
        apply(machine, variable="GRUB_CMDLINE_LINUX_DEFAULT")
    unchanged(machine, before)
    assert not (machine.root / OWN).exists()


def test_a_drop_in_of_ours_that_was_edited_is_not_guessed_at(machine: FakeMachine) -> None:
    put(machine, OWN, "# Written by emupmem\nGRUB_CMDLINE_LINUX=foo\n")
    with pytest.raises(EmupmemError, match="is not as emupmem wrote it"):
        apply(machine)


def test_a_drop_in_that_extends_is_no_obstacle(machine: FakeMachine) -> None:
    put(machine, "/etc/default/grub.d/a.cfg", 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX iommu=pt"\n')
    apply(machine)
    assert menu(machine).count("memmap=16G!4G iommu=pt") == 3


@pytest.mark.parametrize(
    ("text", "item", "limit"),
    [
        (rb"memmap=64K\$0x18690000", "64K\ufffdx18690000", "64 KiB"),
        (b"memmap=1GiB!6G", "1GiB!6G", "1 GiB"),
        (rb"memmap=1G\\\\!6G", r"1G\\!6G", "1 GiB"),
        (rb"memmap=64K\\\$0x18690000", "", ""),
        (rb"memmap=1G\!6G", "", ""),
    ],
)
def test_what_the_kernel_would_take_for_a_limit_is_named(
    tmp_path: Path, text: bytes, item: str, limit: str
) -> None:
    machine = build(tmp_path, STOCK.replace(b'LINUX=""', b'LINUX="%s"' % text))
    assert machine.output("update-grub2") is not None
    if not item:
        assert prepare_apply(machine, FOUND, Request(GIB), Options(add=True)).needed
        return
    with pytest.raises(EmupmemError, match=f"is a limit of {limit} for all memory") as caught:
        prepare_apply(machine, FOUND, Request(GIB), Options())
    assert f"memmap={item} on the kernel" in caught.value.message


def test_a_drop_in_that_reserves_is_refused(machine: FakeMachine) -> None:
    put(machine, "/etc/default/grub.d/a.cfg", 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=1G!4G"\n')
    with pytest.raises(EmupmemError, match=r"grub\.d/a\.cfg:1 reserves memory already"):
        apply(machine)


def test_a_file_that_changed_meanwhile_is_not_overwritten(machine: FakeMachine) -> None:
    prepared = prepare_apply(machine, FOUND, Request(GIB), Options())
    put(machine, "/etc/default/grub", b"GRUB_TIMEOUT=9\n")
    with pytest.raises(EmupmemError, match="was changed by another program in the meantime"):
        carry_out_change(machine, prepared)
    assert default(machine) == b"GRUB_TIMEOUT=9\n"


def test_two_at_once(machine: FakeMachine) -> None:
    prepared = prepare_apply(machine, FOUND, Request(GIB), Options())
    with (
        lock.change_lock(machine),
        pytest.raises(EmupmemError, match=f"another emupmem is at work .process {os.getpid()}"),
    ):
        carry_out_change(machine, prepared)
    carry_out_change(machine, prepared)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", ["locked", "backup", "set aside", "written", "generated"])
def test_a_signal_at_any_step_leaves_the_old_or_the_new(machine: FakeMachine, number: int, step: str) -> None:
    before = menu(machine)
    prepared = prepare_apply(machine, FOUND, Request(GIB), Options())

    def tell(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), number)

    with pytest.raises(EmupmemError, match=f"stopped by {signal.Signals(number).name}"):
        carry_out_change(machine, prepared, tell)
    unchanged(machine, before)


def killed(machine: FakeMachine, step: str, what: str) -> None:
    """Let a process of its own begin, and kill it at that step."""

    def tell(now: str) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            prepared = (
                prepare_remove(machine)
                if what == "remove"
                else prepare_apply(machine, FOUND, Request(GIB), Options())
            )
            carry_out_change(machine, prepared, tell)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


STEPS = ["locked", "backup", "set aside", "written", "generated", "done"]


SOME = [s if s in ("written", "done") else pytest.param(s, marks=pytest.mark.slow) for s in STEPS]


@pytest.mark.parametrize("step", SOME)
def test_killed_at_any_step_of_apply_the_next_apply_or_remove_finishes(
    machine: FakeMachine, step: str
) -> None:
    before = menu(machine)
    killed(machine, step, "apply")
    assert default(machine) in (STOCK, STOCK.replace(b'LINUX=""', b'LINUX="memmap=1G!4G"'))
    assert menu(machine) == before or menu(machine).count("memmap=1G!4G") == 3
    apply(machine, GIB)
    assert default(machine) == STOCK.replace(b'LINUX=""', b'LINUX="memmap=1G!4G"')
    assert menu(machine).count("memmap=1G!4G") == 3
    remove(machine)
    unchanged(machine, before)
    killed(machine, step, "apply")
    remove(machine)
    assert default(machine) == STOCK
    assert menu(machine) == before


@pytest.mark.parametrize("step", SOME)
def test_killed_at_any_step_of_remove_the_next_one_finishes(machine: FakeMachine, step: str) -> None:
    before = menu(machine)
    apply(machine, GIB)
    killed(machine, step, "remove")
    remove(machine)
    assert default(machine) == STOCK
    assert menu(machine) == before


def test_a_menu_that_a_killed_run_tore_is_put_back(machine: FakeMachine) -> None:
    before = menu(machine)
    killed(machine, "written", "apply")
    put(machine, "/boot/grub/grub.cfg", before[: len(before) // 2])  # as a power cut in `cat new > grub.cfg`
    script(machine, "update-grub2", "#!/bin/sh\nexit 1\n")
    with pytest.raises(EmupmemError, match="failed"):
        remove(machine)
    assert menu(machine) == before


def test_a_place_for_backups_that_cannot_be_made_refuses_before_anything_changed(
    machine: FakeMachine,
) -> None:
    before = menu(machine)
    put(machine, "/var/backups/emupmem", "a file where the folder should be")
    with pytest.raises(EmupmemError, match="/var/backups/emupmem cannot be written"):
        apply(machine)
    unchanged(machine, before)


# Two places, other hands, other menus ---------------------------------------------------------------------

BOTH = STOCK.replace(b'LINUX=""', b'LINUX="memmap=1G!4G"').replace(b"splash", b"splash memmap=1G!6G")


def test_reservations_in_both_variables_are_all_seen(tmp_path: Path) -> None:
    machine = build(tmp_path, BOTH)
    attempts: list[Callable[[], Change]] = [
        lambda: apply(machine, GIB),
        lambda: apply(machine, GIB, add=True),
        lambda: remove(machine, "1G!4G"),
    ]
    for attempt in attempts:
        with pytest.raises(EmupmemError, match="reserves in two places") as caught:
            attempt()
        assert "memmap=1G!6G in GRUB_CMDLINE_LINUX_DEFAULT" in caught.value.message
    assert default(machine) == BOTH
    apply(machine, 2 * GIB, replace=True)
    assert default(machine) == STOCK.replace(b'LINUX=""', b'LINUX="memmap=2G!4G"')


def test_remove_empties_both_variables(tmp_path: Path) -> None:
    machine = build(tmp_path, BOTH)
    remove(machine)
    assert default(machine) == STOCK
    assert "memmap" not in menu(machine)


def test_nokaslr_lifts_the_limit_of_devices_in_the_same_change(machine: FakeMachine) -> None:
    with pytest.raises(EmupmemError, match="5 memmap regions in all") as caught:
        apply(machine, GIB, 5)
    assert "apply with --nokaslr" in caught.value.hint
    apply(machine, GIB, 5, nokaslr=True)
    assert b"memmap=1G!4G,1G!5G,1G!6G,1G!7G,1G!8G nokaslr" in default(machine)
    apply(machine, GIB, add=True)
    assert b"1G!8G,1G!9G nokaslr" in default(machine)
    remove(machine, "1G!9G")
    remove(machine)
    assert default(machine) == STOCK


def test_an_apply_that_was_rolled_back_is_no_record_to_undo(machine: FakeMachine) -> None:
    apply(machine, GIB, nokaslr=True)
    script(machine, "update-grub2", "#!/bin/sh\nexit 1\n")
    with pytest.raises(EmupmemError, match="failed"):
        apply(machine, 2 * GIB, replace=True)
    script(machine, "update-grub2", GENERATOR)
    remove(machine)
    assert default(machine) == STOCK


def test_an_apply_that_was_killed_is_no_record_to_undo_either(machine: FakeMachine) -> None:
    apply(machine, GIB, nokaslr=True)
    prepared = prepare_apply(machine, FOUND, Request(2 * GIB), Options(replace=True))
    (edit,) = prepared.edits
    backups.back_up(
        machine, "/etc/default/grub", "2999-01-01T00:00:00.000000Z", edit.after or b"", ".written"
    )
    backups.back_up(machine, "/etc/default/grub", "2999-01-01T00:00:00.000000Z", edit.before or b"")
    remove(machine)
    assert default(machine) == STOCK


EDITED = 'sed -i "s/TIMEOUT=5/TIMEOUT=1/" "$(dirname $0)/../etc/default/grub"'


def test_an_edit_while_the_menu_is_made_outlives_the_rollback(machine: FakeMachine) -> None:
    before = menu(machine)
    script(machine, "update-grub2", f"#!/bin/sh\n{EDITED}\nexit 1\n")
    with pytest.raises(EmupmemError) as caught:
        apply(machine, GIB)
    assert "keeps the change that another program made" in caught.value.hint
    unchanged(machine, before, STOCK.replace(b"TIMEOUT=5", b"TIMEOUT=1"))


def test_a_rewrite_while_the_menu_is_made_is_kept_beside(machine: FakeMachine) -> None:
    before = menu(machine)
    script(
        machine,
        "update-grub2",
        '#!/bin/sh\necho GRUB_TIMEOUT=9 > "$(dirname $0)/../etc/default/grub"\nexit 1\n',
    )
    with pytest.raises(EmupmemError) as caught:
        apply(machine, GIB)
    unchanged(machine, before)
    (kept,) = (machine.root / "var/backups/emupmem").glob("*.edited")
    assert kept.read_text() == "GRUB_TIMEOUT=9\n"
    assert f"/var/backups/emupmem/{kept.name}" in caught.value.hint


def test_an_edit_while_the_menu_is_made_is_said_after_success(machine: FakeMachine) -> None:
    script(machine, "update-grub2", GENERATOR.replace("echo done", f"{EDITED}; echo done"))
    prepared = prepare_apply(machine, FOUND, Request(GIB), Options())
    assert (
        "was changed by another program while the menu was generated"
        in carry_out_change(machine, prepared).problem
    )
    assert b"TIMEOUT=1" in default(machine)


def test_the_menu_that_lies_here_is_the_one_that_is_written(machine: FakeMachine) -> None:
    (machine.root / "boot/grub").rename(machine.root / "boot/grub2")
    (machine.root / "sbin/update-grub2").rename(machine.root / "sbin/grub-mkconfig")
    generator = machine.root / "sbin/grub-mkconfig"
    generator.write_text(GENERATOR.replace('out="$root/boot/grub/grub.cfg"', 'out="$root$2"'))
    apply(machine, GIB)
    assert (machine.root / "boot/grub2/grub.cfg").read_text().count("memmap=1G!4G") == 3
    assert not (machine.root / "boot/grub").exists()


def test_a_menu_that_appears_elsewhere_is_not_mistaken_for_the_one_that_boots(machine: FakeMachine) -> None:
    (machine.root / "boot/grub").rename(machine.root / "boot/grub2")
    before = (machine.root / "boot/grub2/grub.cfg").read_text()
    (machine.root / "boot/grub").mkdir()
    with pytest.raises(EmupmemError, match=r"not as planned: /boot/grub2/grub\.cfg"):
        apply(machine, GIB)  # this update-grub2 writes /boot/grub/grub.cfg
    assert (machine.root / "boot/grub2/grub.cfg").read_text() == before
    assert not (machine.root / "boot/grub/grub.cfg").exists(), "it would be taken for the menu from now on"


def test_a_menu_that_nobody_touched_needs_no_putting_back(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = menu(machine)
    script(machine, "update-grub2", "#!/bin/sh\nexit 1\n")

    def immutable(self: Path, target: Path) -> Path:
        if target.name == "grub.cfg":
            raise PermissionError(1, "Operation not permitted")
        return real(self, target)

    real = Path.rename
    monkeypatch.setattr(Path, "rename", immutable)
    with pytest.raises(EmupmemError) as caught:
        apply(machine, GIB)
    assert "the old configuration is back" in caught.value.hint
    unchanged(machine, before)


def test_where_the_copy_has_gone_the_menu_is_written_back(machine: FakeMachine) -> None:
    before = menu(machine)
    script(
        machine,
        "update-grub2",
        TEARS.replace("exit 1", 'rm "$(dirname $0)/../boot/grub/"/.grub.cfg.*\nexit 1'),
    )
    with pytest.raises(EmupmemError) as caught:
        apply(machine, GIB)
    assert "the old configuration is back" in caught.value.hint
    unchanged(machine, before)


def test_a_copy_left_over_is_cleared_by_the_next_run(machine: FakeMachine) -> None:
    apply(machine, GIB)
    backups.set_aside(machine, "/boot/grub/grub.cfg")
    assert apply(machine, GIB).needed
    assert leftovers(machine) == []


def test_the_tree_of_another_machine_finds_no_programs(tmp_path: Path) -> None:
    from emupmem.system.machine import Machine

    mark = 'GRUB_CMDLINE_LINUX="$(uname 2>/dev/null || echo none)"\n'
    put(Machine(tmp_path), "/etc/default/grub", mark)
    here = defaults.effective_line(FakeMachine(tmp_path), mark.encode())
    there = defaults.effective_line(Machine(tmp_path), mark.encode())
    assert (here.words, there.words) == (("Linux",), ("none",))


def test_remove_by_name_reserves_nothing_where_only_the_menu_has_it(machine: FakeMachine) -> None:
    """Somebody took the words out of the defaults by hand, and made no menu of it."""
    apply(machine, GIB, count=2)
    put(machine, "/etc/default/grub", STOCK)
    with pytest.raises(EmupmemError, match="there is no reservation 1G!4G") as caught:
        prepare_remove(machine, ["1G!4G"])
    assert "nothing is reserved" in caught.value.hint
    remove(machine)
    assert default(machine) == STOCK
    assert "memmap" not in menu(machine)


def test_fewer_reservations_may_come_in_another_order(tmp_path: Path) -> None:
    machine = build(tmp_path, STOCK.replace(b'LINUX=""', b'LINUX="memmap=1G!5G,1G!4G,1G!12G"'))
    apply(machine, GIB, count=2, replace=True)
    assert menu(machine).count("memmap=1G!4G,1G!5G") == 3
