# SPDX-License-Identifier: Apache-2.0
"""Start-up beside a bare typer program: `python -m tests.bench.startup [PYTHON]`.

CPU time is the smallest of some runs, so that other work on the machine counts little; with valgrind the instructions
are counted too, which other work does not change at all. Each is told as a ratio: what is typer's is not ours.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import PROJECT
from tests.bench.table import SUGGEST, USAGE, Row
from tests.fake import LOG

RUNS = 15
OLDEST = ("typer==0.15.2", "click==8.1.8", "rich==13.9.4", "regex==2024.11.6")
"""What Debian 13 has (python-augeas is not needed to start)."""

BARE = """
import typer

app = typer.Typer()


@app.command()
def one(size: str = "1G") -> None:
    '''Say a size.'''
    print(size)


@app.command()
def two() -> None:
    '''Say nothing.'''


app()
"""


class Program:
    """A Python program with its arguments."""

    def __init__(self, python: str, *words: str) -> None:
        self.argv = [python, *words]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.environment |= {"PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "0"}

    def run(self, before: Sequence[str] = (), extra: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start it, its output to nowhere but for standard error in a pipe."""
        argv = [*before, self.argv[0], *extra, *self.argv[1:]]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(argv, stdout=null, stderr=pipe, env=self.environment, cwd=PROJECT)

    def seconds(self) -> float:
        """CPU time of one run, user and system."""
        child = self.run()
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stderr.close()
        if child.returncode:
            raise RuntimeError(said.decode(errors="replace"))
        return used.ru_utime + used.ru_stime

    def instructions(self, folder: Path) -> int:
        """Instructions of one run, as valgrind counts them."""
        file = folder / "callgrind"
        child = self.run(("valgrind", "--tool=callgrind", f"--callgrind-out-file={file}"))
        child.communicate()
        return int(re.findall(r"^(?:summary|totals): (\d+)", file.read_text(), re.MULTILINE)[-1])

    def imports(self) -> Mapping[str, int]:
        """Microseconds of each import without those inside it, as -X importtime says."""
        _, said = self.run(extra=("-X", "importtime")).communicate()
        lines = re.findall(rb"import time: +(\d+) \| +\d+ \| +([\w.]+)", said)
        return {name.decode(): int(own) for own, name in lines}


def measure(python: str, title: str, folder: Path) -> list[Row]:
    """The ratios for one interpreter with its libraries."""
    (folder / "bare.py").write_text(BARE)
    (folder / "boot.log").write_text(LOG)
    bare, bare_help = (Program(python, str(folder / "bare.py"), word) for word in ("one", "--help"))
    suggest = Program(python, "-m", "emupmem", "suggest", "--from", str(folder / "boot.log"))
    usage = Program(python, "-m", "emupmem", "--help")
    programs = (bare, bare_help, suggest, usage)
    least = [
        min(taken) for taken in zip(*[[p.seconds() for p in programs] for _ in range(RUNS)], strict=True)
    ]
    counted = [p.instructions(folder) for p in programs] if shutil.which("valgrind") else []
    rows = []
    for name, ours, theirs in ((SUGGEST, 2, 0), (USAGE, 3, 1)):
        told = (
            f"{least[ours]:.3f} s of CPU time, {least[ours] / least[theirs]:.2f} times a bare typer program"
        )
        told += f" ({counted[ours] / counted[theirs]:.2f} times its instructions)" if counted else ""
        rows.append(Row(f"{name}, {title}", told))
    print(f"where the start of suggest goes, {title}: milliseconds of imports that the bare program has not")
    print("\n".join(_where(bare.imports(), suggest.imports())))
    return rows


def _where(bare: Mapping[str, int], ours: Mapping[str, int]) -> list[str]:
    own = {name: spent for name, spent in ours.items() if name not in bare}
    packages: Counter[str] = Counter()
    for name, spent in own.items():
        packages[name.partition(".")[0]] += spent
    lines = [f"  {spent / 1000:7.1f}  {name} in all" for name, spent in packages.most_common(4)]
    return lines + [f"  {own[n] / 1000:7.1f}  {n}" for n in sorted(own, key=lambda n: -own[n])[:8]]


def version_of(python: str) -> str:
    """`typer 0.29.2, Python 3.11`."""
    code = (
        "import sys; from importlib.metadata import version; "
        "print(f'typer {version(\"typer\")}, Python {sys.version_info[0]}.{sys.version_info[1]}')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def oldest(folder: Path) -> str:
    """An interpreter with the oldest libraries; empty where pip cannot get them."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *OLDEST]
    done = subprocess.run(pip, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return python if done.returncode == 0 else ""


def start_up() -> list[Row]:
    """The rows of the table, for this interpreter's libraries and for the oldest ones."""
    compileall.compile_dir(PROJECT / "emupmem", quiet=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = measure(sys.executable, version_of(sys.executable), folder)
        old = oldest(folder / "old")
        if not old:
            return [*rows, Row(f"{SUGGEST}, typer 0.15", "not measured: pip could not install it")]
        return rows + measure(old, version_of(old), folder)


if __name__ == "__main__":
    for row in start_up():
        print(f"{row.what}: {row.measured}")
