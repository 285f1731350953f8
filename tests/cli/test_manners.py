# SPDX-License-Identifier: Apache-2.0
"""How the program behaves on terminals, in pipes, with --quiet, and while something takes its time."""

from __future__ import annotations

import ast
import io
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emupmem.cli import given, progress, render
from emupmem.cli.copied import OWN, commands_in
from emupmem.cli.main import COMMANDS as COMMANDS_HERE
from emupmem.cli.terminal import Printer, fitted, has_colours, width_of
from emupmem.model import GIB, Command, DeviceKind, FirmwareMap, Kind, Loss, MapEntry, Request
from emupmem.planner.plan import plan
from emupmem.planner.situation import Situation
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.system.waiting import watched_by
from tests import PROJECT
from tests.cli.runner import Run
from tests.fake import LOG, FakeMachine


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self) -> bool:
        return True


# Lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "width", "hang", "lines"),
    [
        ("one two three", 40, 0, ["one two three"]),
        ("one two three", 8, 2, ["one two", "three"]),
        ("one two three four", 8, 2, ["one two", "three", "four"]),
        ("  indented words", 10, 4, ["  indented", "words"]),
        ("/a/path/that/is/long and more", 8, 0, ["/a/path/that/is/long", "and more"]),
        ("    /a/path/that/is/long", 8, 0, ["    /a/path/that/is/long"]),
        ("", 8, 0, [""]),
        ("exactly8", 8, 0, ["exactly8"]),
        ("exactly8 9", 8, 0, ["exactly8", "9"]),
        ("ends with a blank   ", 17, 0, ["ends with a blank"]),
    ],
)
def test_lines_are_broken_between_words(text: str, width: int, hang: int, lines: list[str]) -> None:
    assert [text[a:b] for a, b in fitted(text, width, hang)] == lines


SENTENCES = (
    "give the whole log, not through grep or head: ⟦sudo dmesg > FILE⟧, or ⟦journalctl -k -b -o cat > FILE⟧",
    "give a saved log (⟦sudo dmesg > FILE⟧) or an archive of ⟦emupmem collect⟧",
    "(a log does not show whether that kernel has the driver: run ⟦emupmem doctor⟧ there)",
    "⟦sudo dmesg | grep -iE 'hmem|dax'⟧ shows why the range was cut",
    "⟦sudo emupmem verify⟧ shows why; ⟦journalctl -b -u emupmem.service⟧ tells why not",
    "the kernel was placed inside the range: add nokaslr (⟦sudo emupmem apply --replace --nokaslr …⟧)",
    "⟦sudo emupmem umount /mnt/pmem0⟧ first; then ⟦sudo emupmem mount /dev/pmem0 '/mnt/a b, or c' --force⟧",
    "on this ⟦sudo emupmem remove⟧ gives the RAM back; ⟦sudo emupmem namespaces⟧ divides it (Linux 6.19 and later)",
    "if it is a log: ⟦zcat log.gz | emupmem suggest --from -⟧",
    "that entry: ⟦efibootmgr -v⟧ shows it, ⟦efibootmgr --create … --unicode 'ALL THE WORDS'⟧ makes a new one",
    "name a file with some MiB of data: ⟦dd if=/dev/urandom of=FILE bs=1M count=64⟧ makes one",
    "Reboot, then:  ⟦sudo emupmem verify⟧, and ⟦sudo emupmem confirm⟧ if all is well",
    "Elsewhere:  ⟦emupmem suggest --from a.tar.gz⟧   or   ⟦emupmem doctor --from a.tar.gz⟧",
    "If the machine does not come up: switch it off; then ⟦sudo emupmem remove⟧.",
    "install python-augeas and libaugeas (Debian: ⟦apt install python3-augeas augeas-lenses⟧)",
    "emupmem changes such machines only, which grubby would change as well; umount is for other mounts",
)
"""What errors, checks and findings say, with the commands in it marked."""


def lines_of(text: str, width: int, lead: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    Printer(stream).print(f"{lead}{text}", hang=len(lead))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("lead", ["", " " * 9, f"{'':14} → "])
def test_no_break_is_inside_a_command(width: int, lead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for marked in SENTENCES:
        commands = re.findall("⟦(.*?)⟧", marked)
        lines = lines_of(re.sub("[⟦⟧]", "", marked), width, lead, monkeypatch)
        for command in commands:
            assert any(command in line for line in lines), lines
        for line in lines:
            alone = line.removeprefix(lead).strip("( ").startswith(tuple(commands)) if commands else False
            assert len(line) <= width or alone, lines
            assert line.strip() != "→", lines


def texts_of(node: ast.AST) -> Iterator[str]:
    """All texts of a module, with X for what is put into them; the descriptions of functions are none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "/X" for v in node.values)
    else:
        for child in ast.iter_child_nodes(node):
            told = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            yield from () if told else texts_of(child)


ENDING_WITH_S = {"args", "efivarfs", "kargs", "namespaces", "status", "wipefs", "zfs"}
"""What is a part of a command although it looks like the verb that follows one."""


def test_no_text_of_the_program_is_broken_inside_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (PROJECT / "emupmem").rglob("*.py")
    texts = {t for m in modules for t in texts_of(ast.parse(m.read_text())) if " " in t and "\n" not in t}
    found = {t: [t[a:b] for a, b in commands_in(t)] for t in texts}
    assert sum(map(len, found.values())) > 200
    assert set(OWN.split("|")) == {name for name, place in COMMANDS_HERE.items() if not place.hidden}
    for text, commands in found.items():
        last = {w for c in commands for w in c.rstrip(".,;:)").split()[1:] if re.fullmatch("[a-z]+s", w)}
        assert last <= ENDING_WITH_S, (
            f"{last}: the sentence goes on there (_PROSE), or they belong to the command"
        )
        if re.search(rf"\b(sudo \S|emupmem (-|({OWN})\b))| > FILE", text):
            assert commands, text
        for width in (40, 60, 80, 100) if commands else ():
            lines = lines_of(text, width, " " * 9, monkeypatch)
            assert all(any(c in line for line in lines) for c in commands), lines
            assert not [x for x in lines if re.search(r"\b(sudo|cat|dmesg)$|[|>]$|^ *[|>]", x)], lines


def test_colours_go_on_behind_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    Printer(stream).print(("✓", "green"), " " + "word " * 10, ("last", "bold red"), hang=2)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("\x1b[32m✓\x1b[0m word")
    assert second.startswith("  word")
    assert second.endswith("\x1b[1;31mlast\x1b[0m")
    pipe = io.StringIO()
    Printer(pipe).print(("✓", "green"), " " + "word " * 20)
    assert pipe.getvalue() == "✓ " + "word " * 20 + "\n"


@pytest.mark.parametrize(
    ("terminal", "environment", "wanted"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (True, {"TERM": "xterm", "CLICOLOR": "0"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"CLICOLOR_FORCE": "1"}, True),
        (False, {"CLICOLOR_FORCE": "0"}, False),
        (False, {"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_who_decides_about_colours(terminal: bool, environment: dict[str, str], wanted: bool) -> None:
    assert has_colours(Terminal() if terminal else io.StringIO(), environment) is wanted


def test_odd_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, wide in (("0", 80), ("x", 80), ("20", 40), ("200", 200), ("9" * 9, 80), ("²", 80)):
        monkeypatch.setenv("COLUMNS", said)
        assert width_of(io.StringIO()) == wide


@pytest.mark.parametrize(
    ("columns", "widest"), [("40", 40), ("46", 46), ("51", 51), ("80", 78), ("200", 120)]
)
def test_help_is_as_narrow_as_the_terminal(
    run: Run, columns: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "GRUB_CMDLINE_LINUX" in run("apply", "--help").out, "the options have room for their words"
    lines = run("--help").out.splitlines()
    assert widest * 0.8 < max(len(line) for line in lines) <= widest


# --quiet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> str:
    (tmp_path / "boot.log").write_text(LOG)
    return str(tmp_path / "boot.log")


def test_quiet_shows_only_what_is_wrong(run: Run, here: FakeMachine, log: str) -> None:
    assert run("--quiet", "suggest", "--from", log) == (0, "", "")
    assert run("suggest", "--from", log, "-q") == (0, "", "")
    wrong = run("--quiet", "suggest", "--size", "16T", "--from", log)
    assert wrong.status == 1
    assert wrong.err.startswith("emupmem: no usable range")
    assert run("-q", "suggest", "--from", log, "--json").json["plan"]
    done = run("-q", "apply", "--size", "1G", "--yes")
    assert (done.status, done.out) == (0, "")
    assert b"memmap=1G!4G" in (here.root / "etc/default/grub").read_bytes()


def test_quiet_does_not_ask(run: Run, here: FakeMachine) -> None:
    before = (here.root / "etc/default/grub").read_bytes()
    done = run("-q", "apply", "--size", "1G", terminal=True, stdin=b"y\n")
    assert done.status == 2
    assert "--yes" in done.err
    assert (here.root / "etc/default/grub").read_bytes() == before


def test_quiet_and_verbose_exclude_each_other(run: Run, log: str) -> None:
    assert run("-q", "-v", "suggest", "--from", log).status == 2


def test_what_other_programs_read_is_printed_all_the_same(run: Run) -> None:
    assert run("-q", "completion", "bash").out.startswith("# Completion of emupmem for bash")
    assert run("-q", "help").out.startswith("NAME")


def test_the_programs_own_options_may_follow_the_command(run: Run, log: str) -> None:
    assert run("suggest", "--verbose", "--from", log).status == 0
    assert run("qemu", "args", "--pmem", "1G", "--", "-v").status != 2 or "-v" not in run("qemu").err


# What takes its time --------------------------------------------------------------------------------------------


def test_a_program_that_takes_long_is_named_and_then_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    with watched_by(progress.WaitingLine(shown)):
        Machine().run(Command(("sh", "-c", "echo x; exec sleep 0.2")))
    assert shown.getvalue().startswith("\r… sh, 0 s\x1b[K")
    assert shown.getvalue().endswith("\r\x1b[K")


def test_on_a_terminal_that_cannot_write_over_a_line_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.0)
    monkeypatch.setenv("TERM", "dumb")
    shown = Terminal()
    with watched_by(progress.WaitingLine(shown)):
        assert not wait_for(lambda: False, 0.3, "the device")
    assert shown.getvalue() == "waiting for the device …\n"


def test_what_is_quick_is_not_shown() -> None:
    shown = Terminal()
    with watched_by(progress.WaitingLine(shown)):
        Machine().run(Command(("true",)))
        wait_for(lambda: True, 1)
    assert shown.getvalue() == ""


def test_nothing_is_shown_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.0)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress.shown_waiting():
        Machine().run(Command(("sh", "-c", "echo x")))
    assert pipe.getvalue() == ""


# Whole commands on real terminals -------------------------------------------------------------------------------


EACH = """
import os, sys
from emupmem.__main__ import start
import emupmem.cli.main, emupmem.cli.manual, emupmem.cli.suggest  # what they share is imported once
for words in ARGVS:
    child = os.fork()
    if not child:
        sys.argv = ["emupmem", *words]
        start()
    os.waitpid(child, 0)
    os.write(1, b"\\0")
"""


def on_terminal(columns: int, argvs: list[list[str]], **environment: str) -> list[str]:
    """What a person sees who types each of these in a terminal of that width."""
    main, other = pty.openpty()
    known = {"PATH": os.environ["PATH"], "TERM": "xterm", "LC_ALL": "C.UTF-8", **environment}
    subprocess.run(["stty", "-F", os.ttyname(other), "cols", str(columns), "rows", "50"], check=True)
    argv = [sys.executable, "-c", EACH.replace("ARGVS", repr(argvs))]
    child = subprocess.Popen(argv, stdin=other, stdout=other, stderr=other, env=known, cwd=PROJECT)
    os.close(other)
    seen = b""
    while True:
        select.select([main], [], [])
        try:
            data = os.read(main, 1 << 16)
        except OSError:  # nobody has the other end any more
            break
        if not data:
            break
        seen += data
    os.close(main)
    assert child.wait() == 0
    *texts, rest = seen.decode().split("\0")
    assert (len(texts), rest) == (len(argvs), "")
    return texts


COMMANDS: list[list[str]] = [
    ["suggest", "--size", "1G"],
    ["suggest", "--size", "40G"],
    ["suggest", "--size", "17G"],
    ["suggest", "--size", "3M"],
    ["suggest", "--offset", "1G"],
    ["suggest", "--count", "9"],
]


@pytest.mark.parametrize("columns", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_lines_fit_the_terminal(columns: int, log: str) -> None:
    widest = 0
    for shown in on_terminal(columns, [[*words, "--from", log] for words in COMMANDS]):
        text = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        for line in text.splitlines():
            assert len(line) <= columns or line.startswith("Next:") or log in line, line
            widest = max(widest, len(line))
    assert widest > columns * 0.9, "the width is used"


@pytest.mark.parametrize(
    ("width", "kind", "wanted"),
    [
        (
            40,
            DeviceKind.PMEM,
            [
                "  ▒ usable   ░ firmware",
                "  × lost: the kernel took it away",
                "  · not memory",
                "  █ planned: persistent, volatile",
            ],
        ),
        (
            40,
            DeviceKind.DEVDAX,
            [
                "  ▒ usable   ░ firmware",
                "  × lost: the kernel took it away",
                "  · not memory",
                "  █ planned: persistent as a DAX device,",
                "    volatile",
            ],
        ),
        (
            80,
            DeviceKind.PMEM,
            [
                "  ▒ usable   ░ firmware   × lost: the kernel took it away   · not memory",
                "  █ planned: persistent, volatile",
            ],
        ),
        (
            106,
            DeviceKind.PMEM,
            [
                "  ▒ usable   ░ firmware   × lost: the kernel took it away   · not memory   "
                "█ planned: persistent, volatile"
            ],
        ),
    ],
)
def test_the_legend_is_broken_between_its_entries(
    width: int, kind: DeviceKind, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    firmware = FirmwareMap(
        (
            MapEntry(0, 4 * GIB, Kind.RAM),
            MapEntry(5 * GIB, 6 * GIB, Kind.RESERVED),
            MapEntry(6 * GIB, 30 * GIB, Kind.RAM),
        )
    )
    lost = Situation(firmware, losses=(Loss(20 * GIB, 30 * GIB, "the kernel"),))
    made = plan(lost, Request(4 * GIB, kind=kind))
    stream = Terminal()
    render.suggestion(Printer(stream), lost, "a log", [], [], made)
    lines = stream.getvalue().splitlines()
    assert [len(line) for line in lines[2:4]] == [width - 2] * 2
    assert lines[4 : lines.index("", 4)] == wanted
    pipe = io.StringIO()
    render.suggestion(Printer(pipe), lost, "a log", [], [], made)
    whole = [line for line in pipe.getvalue().splitlines() if "not memory" in line]
    assert len(whole) == 1, "elsewhere every line stays whole"
    assert "planned: " in whole[0]


@pytest.mark.slow
def test_without_utf_8_nothing_is_broken(log: str) -> None:
    known = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PAGER": "cat"}
    argvs = [*([*words, "--from", log] for words in COMMANDS), ["help"], ["--help"]]
    for words, text in zip(argvs, on_terminal(80, argvs, **known), strict=True):
        assert text, words
        assert text.isascii(), words
        assert "?" not in text.replace("?]", ""), words


# Start-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "--count 2 --numa-node 0 --as dax --source auto"])
def test_what_needs_no_check_is_checked_by_no_library(log: str, words: str) -> None:
    """Neither pydantic (typer 0.29) nor rich (typer 0.15) is loaded by a usual command."""
    code = (
        "import sys; sys.argv = ['emupmem', 'suggest', '--size', '1G', '--from', *sys.argv[1:]]\n"
        "from emupmem.__main__ import start\n"
        "try: start()\n"
        "finally: print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)\n"
    )
    argv = [sys.executable, "-c", code, log, *words.split()]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode < 2, done.stderr
    assert not {"pydantic", "rich", "logging", "augeas"} & set(re.findall(r"'(\w+)'", done.stderr))


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("try: import rich\nexcept ImportError: rich = None", True),
        ("import importlib.util\nrich = importlib.util.find_spec('rich')", True),
        ("import rich", False),
    ],
)
def test_typer_gets_rich_only_where_it_cannot_do_without(text: str, without: bool, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(text)
    (tmp_path / "rich.py").write_text("")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from emupmem.cli.typer_alone import import_typer\n"
        "import_typer(); import_typer()\n"
        "import typer; print(typer.rich is None)\n"
        "import rich; print(rich.__file__ == sys.argv[1] + '/rich.py')\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(without), "True"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "x"], "'x' is not a whole number"),
        (["--count", "0"], "it must be 1 or more"),
        (["--source", "x"], "'x' is not one of"),
    ],
)
def test_what_was_typed_is_checked(run: Run, log: str, words: list[str], message: str) -> None:
    assert given.check_only_given is not None
    done = run("suggest", "--from", log, *words)
    assert done.status == 2
    assert message in done.err
