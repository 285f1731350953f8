# SPDX-License-Identifier: Apache-2.0
"""Reading a generated grub.cfg."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.boot import entry as boot_entry
from emupmem.boot.grub import menu
from emupmem.model import GIB

CFG = r"""
set default="0"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
fi
### BEGIN /etc/grub.d/00_header ###
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
  fi
}
### END /etc/grub.d/00_header ###
### BEGIN /etc/grub.d/10_linux ###
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-1' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	linux	/boot/vmlinuz-6.1.0-40-amd64 root=UUID=1 ro memmap=1G!4G quiet
	initrd	/boot/initrd.img-6.1.0-40-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-40-amd64' $menuentry_id_option 'gnulinux-6.1.0-40-amd64-advanced-1' {
		linux	/boot/vmlinuz-6.1.0-40-amd64 root=UUID=1 ro memmap=1G!4G quiet $vt_handoff
	}
	menuentry 'Linux 6.1.0-40-amd64 (recovery mode)' $menuentry_id_option 'gnulinux-6.1.0-40-amd64-recovery-1' {
		linux	/boot/vmlinuz-6.1.0-40-amd64 root=UUID=1 ro single memmap=1G!4G
	}
	menuentry 'Old' --id old {
		linux	/boot/vmlinuz-5.10.0-1-amd64 root=UUID=1 ro memmap=1G!4G quiet
	}
}
### END /etc/grub.d/10_linux ###
### BEGIN /etc/grub.d/30_os-prober ###
menuentry 'Fedora' {
	linux /vmlinuz-6.9 root=/dev/sdb1
}
### END /etc/grub.d/30_os-prober ###
"""


def test_entries_in_order_with_their_places() -> None:
    found = menu.entries(CFG)
    assert [(e.index, e.release, e.recovery, e.ours) for e in found] == [
        ((0,), "6.1.0-40-amd64", False, True),
        ((1, 0), "6.1.0-40-amd64", False, True),
        ((1, 1), "6.1.0-40-amd64", True, True),
        ((1, 2), "5.10.0-1-amd64", False, True),
        ((2,), "6.9", False, False),
    ]
    assert [i.text for i in found[0].command_line.reservations] == ["1G!4G"]
    assert found[0].command_line.reservations[0].start == 4 * GIB


@pytest.mark.parametrize(
    ("default", "env", "index"),
    [
        ("0", {}, (0,)),
        ("1>2", {}, (1, 2)),
        ("gnulinux-advanced-1>old", {}, (1, 2)),
        ("Advanced options for Debian GNU/Linux>Old", {}, (1, 2)),
        ("Fedora", {}, (2,)),
        ("${saved_entry}", {"saved_entry": "2"}, (2,)),
        ("${saved_entry}", {}, (0,)),
        ("0", {"next_entry": "1>2"}, (1, 2)),
        ("7", {}, None),
    ],
)
def test_the_entry_that_boots(default: str, env: dict[str, str], index: tuple[int, ...] | None) -> None:
    entry = menu.default_entry(CFG.replace('default="0"', f'default="{default}"'), env)
    assert (entry.index if entry else None) == index


def test_a_menu_as_planned_has_no_problems() -> None:
    assert boot_entry.problems(menu.entries(CFG), ["1G!4G"], ["1G!4G"]) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ro memmap=1G!4G quiet $vt", "ro quiet $vt", "no reservation instead of memmap=1G!4G"),
        ("ro memmap=1G!4G quiet $vt", "ro memmap=2G!4G quiet $vt", "memmap=2G!4G instead of memmap=1G!4G"),
        ("ro memmap=1G!4G quiet $vt", "ro memmap=1G!4G memmap=1G!4G $vt", "memmap=1G!4G,1G!4G instead"),
        ("ro memmap=1G!4G quiet $vt", r"ro memmap=1G\\!4G $vt", "as a memory limit"),
        (
            "ro memmap=1G!4G quiet $vt",
            "ro memmap=1G!4G memmap=64K$0x18690000 $vt",
            "memmap=64K\ufffdx18690000 would",
        ),
        ("ro memmap=1G!4G quiet $vt", 'ro memmap=1G!4G "memmap=64K${foo}" $vt', "as a memory limit"),
        ("ro memmap=1G!4G quiet $vt", "ro memmap=1GiB!4G $vt", "memmap=1GiB!4G would reach the kernel"),
        ("ro memmap=1G!4G quiet $vt", "ro memmap=1.5G!4G $vt", "as a memory limit"),
        ("ro memmap=1G!4G quiet $vt", "ro memmap=1G!4G " + "x" * 2000, "longer than the 2047 bytes"),
        ("ro memmap=1G!4G quiet $vt", "ro -- memmap=1G!4G $vt", "no reservation instead"),
    ],
)
def test_a_menu_that_is_not_as_planned(old: str, new: str, words: str) -> None:
    wrong = boot_entry.problems(menu.entries(CFG.replace(old, new)), ["1G!4G"], ["1G!4G"])
    assert len(wrong) == 1
    entry, why = wrong[0]
    assert entry is not None
    assert entry.index == (1, 0)
    assert words in why


@pytest.mark.parametrize(
    "text",
    [
        r"memmap=1G\!4G",  # GRUB drops a single backslash
        r"memmap=1G!4G memmap=64K\$0x18690000",
        "memmap=1G!4G 'memmap=64K$0x18690000'",
        "memmap=1G!4G memmap=16G",  # a limit that is meant
        "memmap=1G!4G $vt_handoff ${foo}",
    ],
)
def test_what_reaches_the_kernel_as_it_is_meant_is_no_problem(text: str) -> None:
    cfg = CFG.replace("ro memmap=1G!4G quiet $vt_handoff", f"ro {text}")
    assert boot_entry.problems(menu.entries(cfg), ["1G!4G"], ["1G!4G"]) == []
    assert "$vt" not in menu.entries(cfg)[1].text


def test_a_kernel_that_a_variable_names() -> None:
    (entry,) = menu.entries("menuentry 'x' {\n linux $kernel root=$root quiet\n}\n")
    assert (entry.kernel, entry.words) == ("$kernel", ("root=", "quiet"))


@pytest.mark.parametrize(("more", "long"), [(0, False), (1, True)])
def test_the_last_word_must_fit(more: int, long: bool) -> None:
    start = len("BOOT_IMAGE=/boot/vmlinuz-5.10.0-1-amd64 root=UUID=1 ro memmap=1G!4G ")
    cfg = CFG.replace(
        "ro memmap=1G!4G quiet\n\t}", "ro memmap=1G!4G " + "x" * (2047 - start + more) + "\n\t}"
    )
    wrong = boot_entry.problems(menu.entries(cfg), ["1G!4G"], ["1G!4G"])
    assert [e.index for e, _ in wrong if e] == ([(1, 2)] if long else [])


def test_recovery_entries_have_their_own_expectation() -> None:
    wrong = boot_entry.problems(menu.entries(CFG), ["1G!4G"], [])
    assert [(e.index, why) for e, why in wrong if e] == [
        ((1, 1), "it has memmap=1G!4G instead of no reservation")
    ]


def test_a_menu_without_linux() -> None:
    assert boot_entry.problems((), [], []) == [(None, "there is no normal Linux entry in it")]


def test_a_torn_menu_is_not_whole() -> None:
    assert menu.whole(CFG)
    for cut in range(10, len(CFG) - 1, 97):
        torn = CFG[:cut]
        assert not menu.whole(torn) or torn.endswith("###\n"), torn[-80:]


def test_quotes_as_grub_reads_them() -> None:
    assert menu.split_words(r"""linux /k a="b c" 'd e' f\ g "h\"i" j\!k "x\n" # no comment""") == [
        "linux", "/k", "a=b c", "d e", "f g", 'h"i', "j!k", r"x\n",
    ]  # fmt: skip


def test_a_word_with_a_blank_is_one_word_for_the_kernel() -> None:
    text = "menuentry x {\nlinux /vmlinuz-1 'acpi_osi=!Windows 2012' memmap=1G!4G\n}\n"
    line = menu.entries(text)[0].command_line
    assert line.words == ("acpi_osi=!Windows 2012", "memmap=1G!4G")


def test_kernels_outside_boot_tell_their_release_too() -> None:
    text = "menuentry x {\nlinux /usr/lib/modules/7.2.1-amd64/vmlinuz ro\n}\n"
    assert menu.entries(text)[0].release == "7.2.1-amd64"


def test_the_language_of_a_menu() -> None:
    assert menu.language("  set lang=de_DE\n") == "de_DE.UTF-8"
    assert menu.language("  set lang=C\n") == "C.UTF-8"
    assert menu.language(CFG) == "C"
    assert menu.language("set lang=$(reboot)\n") == "C"


def test_bls_is_seen() -> None:
    assert menu.uses_bls("insmod blscfg\nblscfg\n")
    assert not menu.uses_bls(CFG)


@given(st.text(max_size=300))
def test_no_text_breaks_it(text: str) -> None:
    menu.entries(text)
    menu.default_entry(text, {})
    menu.entries("menuentry {\n" + text)


def test_many_blank_lines_are_read_at_once() -> None:
    """A pattern that crosses lines took the square of their number: minutes for such a menu."""
    text = "\n" * 300_000 + "set lang=de_DE\n"
    assert menu.language(text) == "de_DE.UTF-8"


def test_blocks_in_blocks_do_not_take_the_square_of_their_number() -> None:
    text = "submenu a {\n" * 10_000 + "linux /vmlinuz ro\n" * 10_000 + "}\n" * 10_000
    found = menu.entries(text + "menuentry b {\nlinux /vmlinuz ro\n}\n")
    assert len(found) == 10_001
    assert len(found[0].titles) == 64
    assert found[-1].titles == ("b",)


@pytest.mark.slow
def test_a_word_of_a_million_characters_is_read_at_once() -> None:
    assert menu.split_words("a" + "${" * 500_000) == ["a" + "${" * 500_000]
    assert menu.split_words('"' + "$" * 900_000 + "-", expand=True)[0].endswith("$-")
