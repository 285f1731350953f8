# SPDX-License-Identifier: Apache-2.0
"""Completion: what sh answers, and what the real bash, zsh and fish make of a Tab."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from emupmem.cli.completion import completion_script
from emupmem.system.machine import Machine
from tests.cli.runner import Run
from tests.fake import put

MEMORY = (
    (0x0, 0x9FBFF, "System RAM"),
    (0x100000, 0xBFFFFFFF, "System RAM"),
    (0xFEFFC000, 0xFEFFFFFF, "Reserved"),
    (0x100000000, 0x53FFFFFFF, "System RAM"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine of 20 GiB with two devices, one of them mounted, and one reservation more for the next boot."""
    machine = Machine(tmp_path_factory.mktemp("there"))
    for number, (start, end, kind) in enumerate(MEMORY):
        for name, text in (("start", hex(start)), ("end", hex(end)), ("type", kind)):
            put(machine, f"/sys/firmware/memmap/{number}/{name}", f"{text}\n")
    put(machine, "/proc/meminfo", "MemTotal:       20971520 kB\nMemFree: 1 kB\n")
    put(machine, "/proc/cmdline", "ro memmap=1G!4G,512M!8G quiet\n")
    put(machine, "/proc/self/mounts", "/dev/vda / ext4 rw 0 0\n/dev/pmem0 /mnt/fast ext4 rw,dax 0 0\n")
    put(machine, "/etc/default/grub", 'GRUB_CMDLINE_LINUX="a memmap=1G!4G,512M!8G,2G!12G b"\n')
    put(
        machine,
        "/etc/passwd",
        "root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nalice:x:1000:1000::/:/bin/sh\n",
    )
    for name, size in (("pmem0", 2097152), ("pmem1", 1048576)):
        put(machine, f"/sys/block/{name}/size", f"{size}\n")
    put(machine, "/sys/bus/nd/devices/region0/available_size", f"{3 << 30}\n")
    put(machine, "/sys/bus/nd/devices/region0/size", f"{4 << 30}\n")
    put(machine, "/sys/bus/nd/devices/namespace0.0/size", f"{1 << 30}\n")
    put(machine, "/sys/bus/nd/devices/namespace0.0/mode", "fsdax\n")
    put(machine, "/sys/bus/nd/devices/namespace0.1/size", "0\n")
    put(machine, "/sys/devices/system/node/node1/meminfo", "")
    put(machine, "/dev/dax0.0", "")
    put(machine, "/here/boot.log", "")
    return machine.root


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for sh that all three have in them: what bash would start, printed."""
    path = tmp_path_factory.mktemp("words") / "words.sh"
    assert subprocess.run(["bash", "-n"], input=completion_script("bash"), text=True, check=True)
    _, _, rest = completion_script("bash").partition("sh -c ")
    quoted = rest[: rest.index(' emupmem "${words[@]}"')]
    text = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True
    ).stdout
    path.write_text(text)
    return path


def asked(words: Path, root: Path, *typed: str) -> list[str]:
    """What may come next, without what it means."""
    done = subprocess.run(
        ["sh", str(words), *typed],
        env={"EMUPMEM_COMPLETION_ROOT": str(root), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


SIZES = ["512M", "1G", "2G", "4G", "8G", "16G", "17G"]


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (("app",), ["apply"]),
        (("--q",), ["--quiet"]),
        (("--quiet", "ver"), ["verify"]),
        (("nvdimm", ""), ["show", "goal", "create", "destroy"]),
        (("apply", "--size", ""), SIZES),
        (("apply", "--size=1"), ["1G", "16G", "17G"]),
        (("suggest", "--offset", ""), ["4G"]),
        (("apply", "--size", "1G", "--si"), []),
        (("apply", "--mount", "/a", "--mou"), ["--mount"]),
        (("apply", "--tri"), ["--trial", "--trial=kexec"]),
        (("apply", "--fs", ""), ["ext4", "xfs"]),
        (("apply", "--owner", ""), ["root", "alice"]),
        (("apply", "--numa-node", ""), ["1"]),
        (("bench", ""), ["node1", "/dev/dax0.0", "@files"]),
        (("bench", "node1", "/dev/d"), ["/dev/dax0.0", "@files"]),
        (("remove", ""), ["1G!4G", "512M!8G", "2G!12G"]),
        (("remove", "1G!4G", "2"), ["2G!12G"]),
        (("mount", ""), ["/dev/pmem0", "/dev/pmem1"]),
        (("mount", "/dev/pmem0", ""), ["@folders"]),
        (("umount", ""), ["/mnt/fast"]),
        (("save", ""), ["@files"]),
        (("save", "file", ""), ["/dev/pmem0", "/dev/pmem1", "/mnt/fast"]),
        (("restore", "file", "/dev/pmem1"), ["/dev/pmem1"]),
        (("namespaces", "delete", ""), ["namespace0.0", "/dev/pmem0", "/dev/pmem1"]),
        (("namespaces", "create", "--size", ""), ["512M", "1G", "2G", "3G"]),
        (("nvdimm", "create", "--region", ""), ["region0"]),
        (("nvdimm", "create", "--mode", "d"), ["devdax"]),
        (("qemu", "run", "--pmem", "1G", "--", "-drive"), ["@files"]),
        (("qemu", "args", "--label", ""), ["128K", "1M", "2M"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("suggest", "--from", ""), ["@files"]),
        (("boot-",), []),
        (("nonsense[", "mo*"), []),
    ],
)
def test_what_sh_answers(words: Path, root: Path, typed: tuple[str, ...], wanted: list[str]) -> None:
    assert asked(words, root, *typed) == wanted


def test_without_anything_there(words: Path, tmp_path: Path) -> None:
    put(Machine(tmp_path), "/proc/meminfo", "MemTotal:       8388608 kB\n")
    put(Machine(tmp_path), "/proc/self/mounts", "")
    put(Machine(tmp_path), "/etc/passwd", "")
    assert asked(words, tmp_path, "apply", "--size", "") == ["512M", "1G", "2G", "4G"]
    for typed in (("remove", ""), ("umount", ""), ("nvdimm", "create", "--size", "")):
        assert [w for w in asked(words, tmp_path, *typed) if not w.startswith("-")] == []


def test_every_option_is_offered(words: Path, root: Path, run: Run) -> None:
    for command in ((), ("apply",), ("nvdimm", "create"), ("qemu", "run")):
        listed = {
            word.split("=")[0].rstrip(",.")
            for line in run(*command, "--help").out.splitlines()
            for word in line.split()[:2]
            if word.startswith("--")
        }
        found = {w.partition("=")[0] for w in asked(words, root, *command, "-")}
        assert listed - {"--help", "--"} <= found, command


# The shells -----------------------------------------------------------------------------------------------------

TABS = [
    ("emupmem app", "emupmem apply "),
    ("emupmem apply --si", "emupmem apply --size "),
    ("emupmem apply --size 8", "emupmem apply --size 8G "),
    ("emupmem apply --size=8", "emupmem apply --size=8G "),
    ("emupmem --quiet nvdimm cre", "emupmem --quiet nvdimm create "),
    ("emupmem remove 1", "emupmem remove 1G\\!4G "),
    ("emupmem save file /dev/pmem1", "emupmem save file /dev/pmem1 "),
    ("emupmem umount /m", "emupmem umount /mnt/fast "),
    ("emupmem suggest --from boo", "emupmem suggest --from boot.log "),
    ("emupmem nvdimm destroy namespace0.0 --y", "emupmem nvdimm destroy namespace0.0 --yes "),
]
BASH = """
PS1='$ '
source "$SCRIPT"
bind -x '"\\C-x\\C-p": printf "%s\\n" "$READLINE_LINE" >>"$SEEN"'
bind 'set bell-style none'
"""
ZSH = """
autoload -U compinit && compinit -u -D
fpath=("${SCRIPT:h}" $fpath)
autoload -U _emupmem && compdef _emupmem emupmem
seen() { print -r -- "$BUFFER" >>"$SEEN" }
zle -N seen
bindkey '^X^P' seen
PS1='$ '
"""


@contextmanager
def typing(argv: list[str], environment: dict[str, str], folder: Path) -> Iterator[int]:
    """A shell that somebody types to: the descriptor to write to."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(argv[0], argv, environment)
    try:
        yield terminal
    finally:
        os.close(terminal)  # hangs up
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


class Typist:
    """Types to a shell and sees what is on its line: Ctrl-X Ctrl-P writes the line to a file, Ctrl-U clears it."""

    def __init__(self, terminal: int, seen: Path) -> None:
        self.terminal, self.seen, self.shown = terminal, seen, b""
        while not self.lines():  # what comes before the shell reads its terminal may be lost
            self.type("ready")
        self.type("go")
        while "go" not in self.lines():
            pass
        self.count = len(self.lines())

    def lines(self) -> list[str]:
        """The lines so far, after some time in which the shell may show something."""
        if select.select([self.terminal], [], [], 0.1)[0]:
            try:
                self.shown += os.read(self.terminal, 1 << 16)
            except OSError:
                raise AssertionError(f"the shell has ended:\n{self.shown.decode(errors='replace')}") from None
        text = self.seen.read_text() if self.seen.exists() else ""
        return text.split("\n")[:-1]

    def type(self, text: str) -> None:
        """Type a line, have it written down, and clear it."""
        os.write(self.terminal, f"{text}\x18\x10\x15".encode())

    def after_tab(self, text: str) -> str:
        """What is on the line after a Tab."""
        self.type(f"{text}\t")
        while len(lines := self.lines()) <= self.count:
            pass
        self.count += 1
        return lines[-1]


def completed(shell: str, root: Path, folder: Path, typed: list[str]) -> list[str]:
    """What is on the line after a Tab behind each of these."""
    made = folder / "_emupmem"
    made.write_text(completion_script(shell))
    seen = folder / "seen"
    environment = {
        **{"PATH": os.environ["PATH"], "HOME": str(folder), "ZDOTDIR": str(folder), "TERM": "vt100"},
        **{"SCRIPT": str(made), "SEEN": str(seen), "EMUPMEM_COMPLETION_ROOT": str(root), "LC_ALL": "C.UTF-8"},
    }
    (folder / ".bashrc").write_text(BASH)
    (folder / ".zshrc").write_text(ZSH)
    argv = {
        "bash": ["bash", "--noprofile", "--rcfile", str(folder / ".bashrc"), "-i"],
        "zsh": ["zsh", "-d", "-i"],
    }
    with typing(argv[shell], environment, root / "here") as terminal:
        typist = Typist(terminal, seen)
        return [typist.after_tab(text) for text in typed]


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_tab_completes(shell: str, root: Path, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert completed(shell, root, tmp_path, [t for t, _ in TABS]) == [wanted for _, wanted in TABS]


def fish(root: Path, folder: Path, typed: str) -> list[str]:
    """The words that fish would offer."""
    (folder / "emupmem.fish").write_text(completion_script("fish"))
    done = subprocess.run(
        [
            "fish",
            "--no-config",
            "-c",
            'source $argv[1]; complete -C "$argv[2]"',
            str(folder / "emupmem.fish"),
            typed,
        ],
        cwd=root / "here",
        env={**os.environ, "HOME": str(folder), "EMUPMEM_COMPLETION_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "line"), TABS)
def test_fish_offers_it(typed: str, line: str, root: Path, tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    last = line.split()[-1].replace("\\", "")
    assert fish(root, tmp_path, typed) == [last]


def test_the_program_prints_the_same(run: Run) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert run("completion", shell).out == completion_script(shell)
    assert run("completion", "tcsh").status == 2
