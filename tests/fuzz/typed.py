# SPDX-License-Identifier: Apache-2.0
"""The command line as a target: any words, on a machine in a folder, and nothing of this machine in reach."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from emupmem.cli.main import COMMANDS, main
from emupmem.editor import shell as editor_shell
from emupmem.report import collected
from emupmem.system import pipe
from tests import judge
from tests.cli import test_lines
from tests.cli.runner import check_json
from tests.fake import FakeMachine, build, put, running

MOST = 200_000
"""Letters that a command may print."""

STATUS = (0, 1, 2, 3)
_TOKEN = re.compile(r"\{(?:dir|log|tree)\}")


def _rows() -> list[list[str]]:
    lines = [x.split(" | ") for x in test_lines.TABLE.read_text().splitlines() if x and x[0] != "#"]
    return [shlex.split(words) for _, words, *_ in lines if "{digits}" not in words and "{long}" not in words]


@cache
def known() -> frozenset[str]:
    """The words of the table: all that may have a / in it, for what they lead to is refused or in the folder."""
    return frozenset(word for row in _rows() for word in row)


@cache
def _folder() -> Path:
    """Where the machine and the odd files are; it goes with the process."""
    return Path(tempfile.mkdtemp(prefix="emupmem-words-"))


@cache
def _template() -> Path:
    made = _folder() / "template"
    machine = build(made / "machine")
    for name, text in test_lines.logs().items():
        if len(text) < 5000:
            put(machine, f"../odd/{name}", text)
    put(machine, "../odd/tree/etc/default/grub", b'GRUB_CMDLINE_LINUX=""\n')
    put(machine, "../odd/longtree/etc/default/grub", b'GRUB_CMDLINE_LINUX="' + b"x" * 2030 + b'"\n')
    (made / "odd/loop").symlink_to("loop")
    return made


def safe(words: Sequence[str]) -> bool:
    """Whether nothing but the folder can be meant: no program is started, no path leads out, nobody waits."""
    if "run" in words or any("qemu" in word and word != "qemu" for word in words):
        return False
    for word, following in zip(words, [*words[1:], ""], strict=True):
        bare = _TOKEN.sub("", word)
        if ".." in word or "\0" in word or ("/" in bare.lstrip("/") and word not in known()):
            return False
        if bare.startswith("/") and bare == word and word not in known():
            return False
        if "=" in word and "/" in word.partition("=")[2] and word not in known():
            return False
        if word.startswith("--w") and (following not in known() or "=" in word):
            return False
    return True


@lru_cache(64)
def _sourced(texts: tuple[bytes, ...]) -> editor_shell.Sourced:
    """What sh makes of the defaults: most inputs leave them as they are."""
    return judge.here(texts, editor_shell.NO_PROGRAMS)


@contextmanager
def _places() -> Iterator[dict[str, str]]:
    """A fresh copy of the machine and the files; the program is in their folder."""
    template, here = _template(), _folder() / "now"
    before = Path.cwd(), dict(os.environ)
    shutil.copytree(template, here, symlinks=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, here)
        os.chdir(here / "odd")
        stack.callback(os.chdir, before[0])
        patch(stack, editor_shell, "run_sh", lambda texts, path="": _sourced(tuple(texts)))
        patch(stack, pipe, "WRITER_SECONDS", 0)
        assert collected  # its base class must be the real machine
        machine = FakeMachine(here / "machine")
        script = machine.root / "sbin/dmesg"
        script.write_text(script.read_text().replace(str(template), str(here)))
        running(lambda module, name, value: patch(stack, module, name, value), machine)
        try:
            odd = str(here / "odd")
            yield {"dir": odd, "log": f"{odd}/log", "tree": f"{odd}/tree"}
        finally:
            os.environ.clear()
            os.environ.update(before[1])


def patch(stack: ExitStack, module: Any, name: str, value: object) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def _run(words: list[str]) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["emupmem", *words], io.TextIOWrapper(io.BytesIO())
    status: object = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as exc:
        status = exc.code
    finally:
        sys.argv, sys.stdin = before
    assert isinstance(status, int)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return status, texts[0], texts[1]


LOUD = re.compile("--verbose|-[a-zA-Z]*v")
"""Options after which more than an error is told; a traceback is what --debug is for."""


def command(data: bytes) -> None:
    """Words after `emupmem`, one a line: a status that is told, a first line that says why, JSON that is whole."""
    words = [w.decode("utf-8", "surrogateescape") for w in data.split(b"\n")]
    if not safe(words) or any(w == "--debug" or LOUD.match(w) for w in words):
        return
    with _places() as places:
        typed = words
        for name, place in places.items():
            typed = [w.replace(f"{{{name}}}", place) for w in typed]
        status, out, err = _run(typed)
        assert status in STATUS
        assert len(out) + len(err) < MOST
        for word in test_lines.NO_TRACE:
            assert word not in err, err[:2000]
        assert "internal error" not in err, err[:2000]
        if status == 2 and "Usage:" not in err:
            assert err.startswith("emupmem: "), err
            assert len(err.splitlines()) == 2, err
            assert not out or out.startswith("{"), out
        elif status == 1:
            assert re.search("^emupmem: ", err, re.M) or out, err
        if out.startswith("{"):
            json.loads(out)
            if typed[0] in COMMANDS:
                check_json(typed, out)


def seeds() -> list[bytes]:
    return ["\n".join(row).encode() for row in _rows() if safe(row)]


_TOKENS = """
--size --count --offset --min-free --numa-node --source --from --root --json --dry-run --check --yes --add --replace
--trial --variable --mount --fs --owner --mode --keep --at-boot --nokaslr --force --list --require --debug -v --help -h
-- - --pmem --backend --label --align --node --device --socket --region --map --libvirt --print --readconfig --readonly
--share --ram --machine 1G 2M 3M 0 1 2 4 5 4G 1G!4G 1024M!4096M memmap=1G!4G 1G!4G,1G!8G root ext4 raw fsdax auto
create resize delete bind args show goal destroy
"""


def tokens() -> list[bytes]:
    """Words of the program, and all of the table's."""
    return [w.encode() for w in (*_TOKENS.split(), *COMMANDS, *known())]
