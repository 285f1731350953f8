# SPDX-License-Identifier: Apache-2.0
"""What menus and defaults of other machines have that Debian's plain ones have not."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from emupmem.boot.grub import menu as grub_menu
from emupmem.cli.terminal import Printer
from emupmem.model import Command
from emupmem.system import files
from tests.boot import test_trial
from tests.cli.runner import Run
from tests.fake import GENERATOR, RELEASE, STOCK, FakeMachine, build, menu, put, running, script

# A generator with translated titles, as gettext makes them: `set lang` is written for a graphical terminal only.
TRANSLATES = """#!/bin/sh -e
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/etc/default/grub"
out="$root/boot/grub/grub.cfg"
case $LANG in
  de_DE*) more="Erweiterte Optionen für Debian" with=mit ;;
  *) more="Advanced options for Debian" with=with ;;
esac
e() {
  echo "menuentry '$1' --class debian \\$menuentry_id_option '$3' {"
  echo "	linux /boot/vmlinuz-$2 root=UUID=0 ro $GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"
  echo "}"
}
{
  echo "set default=\\"$GRUB_DEFAULT\\""
  echo '### BEGIN /etc/grub.d/10_linux ###'
  e Debian 6.12.0-1-amd64 gnulinux-simple
  echo "submenu '$more' \\$menuentry_id_option 'gnulinux-advanced' {"
  e "Debian, $with Linux 6.1.0-32" 6.1.0-32-amd64 gnulinux-6.1.0-32-advanced
  echo "}"
  echo '### END /etc/grub.d/10_linux ###'
} > "$out"
"""
PINNED = "Erweiterte Optionen für Debian>Debian, mit Linux 6.1.0-32"

# The beginning of what 10_linux_zfs of Ubuntu 22.04 prints.
ZSYS = """  echo 'function zsyshistorymenu {'
  echo '	set kernel="${4}"'
  echo "	menuentry 'Revert system only' --class ubuntu \\${menuentry_id_option} 'gnulinux-\\${root_dataset}' {"
  echo "		linux	\\"\\${kernel}\\" root=ZFS=\\"\\${root_dataset}\\" ro $GRUB_CMDLINE_LINUX"
  echo '	}'
  echo '}'
"""


class Narrow(io.StringIO):
    """A terminal of 40 columns."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine whose default is an entry by its German title."""
    machine = build(tmp_path / "machine")
    put(machine, "/etc/default/grub", STOCK.decode().replace("=0\n", f'="{PINNED}"\n', 1))
    script(machine, "update-grub2", TRANSLATES)
    done = machine.run(Command(("update-grub2",)), language="de_DE.UTF-8")
    assert done.status == 0, done
    running(monkeypatch.setattr, machine)
    return machine


def default(machine: FakeMachine) -> tuple[str, ...] | None:
    found = grub_menu.default_entry(menu(machine), {})
    return None if found is None else found.titles


@pytest.mark.parametrize("name", ["/etc/locale.conf", "/etc/default/locale"])
def test_a_menu_keeps_its_language_without_being_told_which(run: Run, pinned: FakeMachine, name: str) -> None:
    put(pinned, name, 'LANG="de_DE.UTF-8"\n')
    before = default(pinned)
    assert before == tuple(PINNED.split(">"))
    assert run("apply", "--size", "1G", "--yes").status == 0
    assert default(pinned) == before
    assert run("remove", "--yes").status == 0
    assert default(pinned) == before


def test_where_another_entry_would_boot_all_is_put_back(run: Run, pinned: FakeMachine) -> None:
    """Its language is not known: the title that GRUB_DEFAULT names is not in the new menu."""
    before = menu(pinned)
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 1
    assert "without the entry that boots by default: “Debian, mit Linux 6.1.0-32”" in done.err
    assert "give its id or its number" in done.err
    assert menu(pinned) == before
    assert b"memmap" not in (pinned.read("/etc/default/grub") or b"")


@pytest.mark.parametrize(
    ("text", "system", "wanted"),
    [
        ("  set lang=sr_RS@latin\n", "", "sr_RS.UTF-8@latin"),
        ("  set lang=C\n", "de_DE.UTF-8", "C.UTF-8"),
        ("submenu 'Advanced options for Debian' {\n", "de_DE.UTF-8", "C"),
        ("submenu 'Erweiterte Optionen' {\n", "de_DE.UTF-8", "de_DE.UTF-8"),
        ("submenu 'Erweiterte Optionen' {\n", "de_DE; reboot", "C"),
        ("menuentry 'Linux' {\n", "de_DE.UTF-8", "C"),
    ],
)
def test_the_language_of_a_menu(text: str, system: str, wanted: str) -> None:
    assert grub_menu.language(text, system) == wanted


def test_entries_of_a_function_are_not_in_the_menu(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = build(tmp_path / "machine")
    test_trial.prepare(machine)
    text = (machine.root / "sbin/update-grub2").read_text()
    begin = "  echo '### BEGIN /etc/grub.d/10_linux ###'\n"
    assert begin in text
    script(machine, "update-grub2", text.replace(begin, begin + ZSYS))
    done = machine.output("update-grub2")
    assert done is not None
    assert done.status == 0, done
    assert default(machine) == ("Debian GNU/Linux (simple mode)",)
    running(monkeypatch.setattr, machine)
    told = run("apply", "--size", "1G", "--trial", "--yes")
    assert told.status == 0, told.err
    assert "/boot/vmlinuz-" in machine.peek("/etc/grub.d/42_emupmem_trial")
    assert "${kernel}" not in machine.peek("/etc/grub.d/42_emupmem_trial")


def test_a_trial_needs_a_kernel_that_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = build(tmp_path / "machine")
    test_trial.prepare(machine)
    text = (machine.root / "sbin/update-grub2").read_text()
    script(machine, "update-grub2", text.replace("/boot/vmlinuz-6", "\\$where/vmlinuz-6"))
    assert (machine.output("update-grub2") or pytest.fail("missing")).status == 0
    running(monkeypatch.setattr, machine)
    told = run("apply", "--size", "1G", "--trial", "--yes")
    assert told.status == 1
    assert "takes its kernel from a variable ($where/vmlinuz-" in told.err
    assert not machine.exists("/etc/grub.d/42_emupmem_trial")


CUSTOM = """  echo '### BEGIN /etc/grub.d/40_custom ###'
  echo '### BEGIN my entries'
  echo '### END of nothing'
  echo '### END /etc/grub.d/40_custom ###'
  echo '### BEGIN /etc/grub.d/41_custom_arch_linux ###'
  echo "menuentry 'My Arch' {"
  echo "	linux /vmlinuz-linux root=/dev/sdb2"
  echo "}"
  echo '### END /etc/grub.d/41_custom_arch_linux ###'
"""


def test_what_somebody_wrote_into_the_menu_is_no_mark_and_not_ours(run: Run, here: FakeMachine) -> None:
    end = '} > "$out.new"\n'
    assert end in GENERATOR
    script(here, "update-grub2", GENERATOR.replace(end, CUSTOM + end))
    for argv in (("apply", "--size", "1G"), ("remove",)):
        done = run(*argv, "--yes")
        assert done.status == 0, done.err
    assert "memmap" not in menu(here)
    torn = menu(here).replace("### END /etc/grub.d/10_linux ###\n", "")
    assert not grub_menu.whole(torn)


def test_drop_ins_that_sh_does_not_source_say_nothing(run: Run, here: FakeMachine) -> None:
    put(here, "/etc/default/grub.d/.50-old.cfg", 'GRUB_CMDLINE_LINUX="memmap=2G!8G"\n')
    (here.root / "etc/default/grub.d/60-masked.cfg").symlink_to("/dev/null")
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done.err
    assert not here.exists("/etc/default/grub.d/zz-emupmem.cfg")
    assert run("remove", "--yes").status == 0


def test_a_label_that_the_kernel_shows_on_fat_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SELinux does it: listed and read, but not set."""
    model = tmp_path / "grubenv"
    model.write_text("old")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "listxattr", lambda *_: ["security.selinux"])
    monkeypatch.setattr(os, "getxattr", lambda *_: b"system_u:object_r:dosfs_t:s0")
    monkeypatch.setattr(os, "setxattr", refuse)
    files.write_like(tmp_path / "fresh", b"new", model)
    assert (tmp_path / "fresh").read_text() == "new"


@pytest.mark.parametrize(
    ("item", "says"),
    [("4G!", "the kernel takes 4 GiB from 0x0 on"), ("1G!4Gx", "the kernel takes 1 GiB from 0x100000000 on")],
)
def test_half_an_item_is_named_and_nothing_is_written_around_it(
    run: Run, here: FakeMachine, item: str, says: str
) -> None:
    put(here, "/etc/default/grub", STOCK.decode().replace('LINUX=""', f'LINUX="memmap={item}"'))
    assert (here.output("update-grub2") or pytest.fail("missing")).status == 0
    before = here.read("/etc/default/grub")
    for argv in (("apply", "--size", "1G"), ("apply", "--size", "1G", "--replace"), ("remove",)):
        done = run(*argv, "--yes")
        assert done.status == 1, done
        assert f"memmap={item} on the kernel command line is not written to its end: {says}" in done.err
        assert "remove it or correct it (memmap=SIZE!START)" in done.err
    assert here.read("/etc/default/grub") == before
    told = run("doctor")
    assert f"memmap={item} is set up already" not in told.out
    assert f"memmap={item} is not written to its end" in told.out


def test_nothing_is_replaced_where_all_is_as_asked(run: Run, here: FakeMachine) -> None:
    assert run("apply", "--size", "1G", "--yes").status == 0
    told = run("suggest", "--size", "1G")
    assert "would take its place" not in told.out + told.err
    assert "Nothing to do: memmap=1G!4G is set up already (sudo emupmem verify proves it)" in told.out
    other = run("suggest", "--size", "2G")
    assert "memmap=1G!4G is reserved already: this plan would take its place" in other.out + other.err


def test_a_kernel_whose_version_is_not_known_is_not_taken_for_the_running_one(
    run: Run, here: FakeMachine
) -> None:
    """Arch's `vmlinuz-linux`, whose image is not there to be read: what doctor warns of, suggest and apply do too."""
    (here.root / "sys/firmware/efi").mkdir(parents=True)
    script(here, "update-grub2", GENERATOR.replace(f"/boot/vmlinuz-{RELEASE}", "/boot/vmlinuz-linux"))
    assert (here.output("update-grub2") or pytest.fail("missing")).status == 0
    for argv in (("doctor",), ("suggest", "--size", "1G"), ("apply", "--size", "1G", "--dry-run")):
        told = run(*argv)
        said = " ".join((told.out + told.err).split())
        assert "the exact version of this kernel is unknown" in said, said


def test_a_narrow_terminal_does_not_get_a_word_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Narrow()
    numbers = "  0x000000000-0x00009fbff    639 KiB     -  "
    Printer(stream).print(f"{numbers}below 4 GiB: the kernel and DMA need it", hang=len(numbers))
    assert stream.getvalue().splitlines()[1:] == ["    -  below 4 GiB: the kernel and DMA", "    need it"]
