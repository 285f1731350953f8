# SPDX-License-Identifier: Apache-2.0
"""`sh`, the judge of every edit: it sources the texts and reports what they come to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

from emupmem.editor.text import VARIABLES, printable
from emupmem.model import EmupmemError
from emupmem.record import record

SH_SECONDS = 10.0
SH = "/bin/sh"
SH_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NO_PROGRAMS = "/nonexistent"


@record
class Sourced:
    """What `sh` made of texts sourced in order, one character per byte.

    `values` holds the two variables after each text that was read to its end; `rest` every other
    shell variable at the end, in the quoting of `set`; `complaints` are sh's own words as
    (index of the text, line, reason). `failed` says why sh did not get to the end, else it is empty; with
    `unread` it was not even started, as nothing would have kept the text from doing harm.
    """

    values: tuple[Mapping[str, str | None], ...]
    rest: Mapping[str, str]
    complaints: tuple[tuple[int, int, str], ...] = ()
    failed: str = ""
    unread: bool = False


Judge = Callable[[Sequence[bytes]], Sourced]


# --- sh, the judge -----------------------------------------------------------------------------------

_DUMP = "command printf '%s\\0' " + " ".join(f'"${{{v}+1}}" "${{{v}-}}"' for v in VARIABLES)
_ENTRY = re.compile(
    r"""^([A-Za-z_]\w*)=((?:\$'(?:\\.|[^'\\])*'|'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^'"\\\n])*+)(?:\n|\Z)""",
    re.S | re.A | re.M,
)
_SHELL_OWN = re.compile(
    r"PPID|OPTIND|OPTARG|OPTERR|_|LINENO|S?RANDOM|SECONDS|EPOCH\w+|BASH\w*|E?UID|SHELLOPTS|PIPESTATUS"
    r"|FUNCNAME|DIRSTACK|GROUPS|HISTCMD|" + "|".join(VARIABLES)
)
_COMPLAINT = re.compile(
    r"(?:\S*sh: )?(?:/dev/fd/\d+: )?(?:\S*sh: )?(?:line )?(\d+): (?:/dev/fd/\d+: )?(?:eval: )?(\S.*)"
)
_CUT_SHORT = re.compile(
    r"syntax error|unexpected EOF"  # bash goes on after it
    r"|(?:cannot|can't) fork|fork: |out of (?:space|memory)|cannot allocate",  # and every sh after that in a subshell
    re.I,
)


def judge(*, with_programs: bool) -> Judge:
    """A judge of texts of this machine, or (without programs) of texts that came from another one.

    A GRUB default may run programs, `lsb_release` say, and read files; neither can change anything. What came
    from elsewhere finds no program and no file here.
    """
    return run_sh if with_programs else partial(run_sh, path=NO_PROGRAMS)


def run_sh(texts: Sequence[bytes], path: str = SH_PATH) -> Sourced:
    """Source texts with `sh` and report the variables: the default judge.

    sh gets an empty environment but `path`, no input, no rights (nobody, when we are root) and 10 seconds, in a
    cage (see `cage`) where it can change nothing; with `path=NO_PROGRAMS` it also sees no file of this machine.
    Where no cage can be had only plain assignments are read, all else is refused with its line (`unread`).
    Raises EmupmemError when it cannot be started or does not finish. What sh can only say the same of each time
    is asked once.
    """
    return _said_once(tuple(texts), path, SH) if is_lasting(texts) else ask_sh(texts, path)


@lru_cache(maxsize=64)
def _said_once(texts: Sequence[bytes], path: str, _: str) -> Sourced:
    return ask_sh(texts, path)


def ask_sh(texts: Sequence[bytes], path: str = SH_PATH) -> Sourced:
    """Start sh on the texts: see `run_sh`. They travel in sealed memory files.

    A pipe of root's cannot be re-opened by nobody, and a script on stdin could be eaten by the commands in it.
    """
    from emupmem.editor import cage
    from emupmem.editor.cage_plan import CageError

    programs = path != NO_PROGRAMS
    with contextlib.ExitStack() as stack:
        try:
            way = cage.best(SH, programs=programs)
            if way is None and (refused := _more_than_plain(texts)):
                return refused
            files = tuple(stack.enter_context(_memory_file(text)) for text in texts)
            job = cage.Job(SH, _script(files), files, path, programs)
            out, err, status = cage.run_in_cage(job, way, SH_SECONDS)
        except (OSError, ValueError, CageError) as exc:
            raise _unjudged(exc) from exc
    return _sourced(out.decode("latin-1"), err.decode("latin-1"), status, len(texts))


def _unjudged(exc: Exception) -> EmupmemError:
    if isinstance(exc, TimeoutError):
        return EmupmemError(
            f"sh did not finish reading the GRUB settings within {SH_SECONDS:g} seconds",
            "look for a command in /etc/default/grub that waits; grub-mkconfig would hang there too",
        )
    if isinstance(exc, ValueError):
        return EmupmemError(
            "sh prints without end when it reads the GRUB settings",
            "look for a loop in /etc/default/grub that prints; grub-mkconfig would do the same",
        )
    hint = "emupmem lets sh, as user nobody, check every change; it needs /bin/sh and /proc"
    reason = (exc.strerror if isinstance(exc, OSError) else None) or exc
    return EmupmemError(f"cannot run sh to check the GRUB settings: {reason}", hint)


_PLAIN_LINE = r"""[ \t]*(?:(?:export[ \t]+)?(?:GRUB|SUSE)_\w*=
    (?:[A-Za-z0-9_.,:=/+@%^!-]|\\[^\n]|'[^']*'|"(?:[^"\\$`]|\\.|\$NAME|\$\{NAME\})*")*+)?
    [ \t]*(?:(?<!\S)\#[^\n]*)?(?:\n|\Z)"""
_HARMLESS_LINE, _LASTING_LINE = (
    re.compile(_PLAIN_LINE.replace("NAME", name), re.S | re.A | re.X)
    for name in (r"[A-Za-z_]\w*", r"(?:GRUB|SUSE)_\w*")
)
"""What can do no harm, and of that what sh always says the same of: `$RANDOM` and `$PPID` do no harm either."""

_DISTRIBUTOR = re.compile(
    rb"""^GRUB_DISTRIBUTOR=(?:
    `(?:lsb_release[ ]-i[ ]-s|\([ ]\.[ ]/etc/os-release(?:;|[ ]&&)[ ]echo[ ]\$\{NAME(?::-\w+)?\}[ ]\))
    (?:[ ]2>[ ]?/dev/null)?(?:[ ]\|\|[ ]echo[ ]\w+)?`
    |"\$\(sed[ ]'s,[ ]release[ ]\.\*\$,,g'[ ]/etc/system-release(?:[ ]2>[ ]?/dev/null)?\)")$(?=\n)""",
    re.M | re.A | re.X,
)
"""The stock lines: they ask for the distribution's name, and can set nothing else."""


def is_lasting(texts: Sequence[bytes]) -> bool:
    """Whether nothing in the texts can come to something else from one time to the next."""
    return _more_than_plain([_DISTRIBUTOR.sub(b"", text) for text in texts], _LASTING_LINE) is None


def _more_than_plain(texts: Sequence[bytes], line: re.Pattern[str] = _HARMLESS_LINE) -> Sourced | None:
    """The refusal of the first line that does more than set a variable of GRUB; None: there is none.

    A name of the shell's own is no such variable: bash runs commands in what is assigned to RANDOM.
    """
    for index, text in enumerate(texts):
        source, at = text.decode("latin-1"), 0
        while at < len(source) and (found := line.match(source, at)):
            at = found.end()
        if at < len(source):
            words = f"{source[at:].partition(chr(10))[0].strip()[:60]} is more than a plain assignment"
            complaint = (index, source.count("\n", 0, at) + 1, words)
            return Sourced(({},) * index, {}, (complaint,), words, unread=True)
    return None


def _script(files: Sequence[int]) -> str:
    # SIGXFSZ (25) ignored: a command that tries to write fails instead of killing the shell.
    steps = ["trap '' 25; ulimit -f 0"]
    for number in files:
        steps.append(f". /dev/fd/{number} >/dev/null\n{_DUMP}; command printf '\\0' >&2")
    return "\n".join([*steps, "set"])


@contextlib.contextmanager
def _memory_file(text: bytes) -> Iterator[int]:
    number = os.memfd_create("emupmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(number, "wb", closefd=False) as stream:
            stream.write(text)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        yield number
    finally:
        os.close(number)


def _sourced(out: str, err: str, status: int, count: int) -> Sourced:
    width = 2 * len(VARIABLES)
    fields = out.split("\0")
    rest, fields = fields[-1], fields[:-1]
    done = min(len(fields) // width, count)
    values = tuple(_value_pairs(fields[i * width : (i + 1) * width]) for i in range(done))
    complaints = []
    for index, part in enumerate(err.split("\0")):
        for line in part.splitlines():
            if found := _COMPLAINT.fullmatch(line):
                complaints.append((min(index, count - 1), int(found[1]), found[2]))
    failed = ""
    if done < count or len(fields) != count * width or not rest:
        failed = f"sh stops before the end of the file (status {status})"
    if bad := next((c for c in complaints if _CUT_SHORT.search(c[2])), None):
        failed = bad[2]
    entries = {m[1]: m[2] for m in _ENTRY.finditer(rest) if not _SHELL_OWN.fullmatch(m[1])}
    return Sourced(values, entries, tuple(complaints), failed)


def _value_pairs(fields: Sequence[str]) -> dict[str, str | None]:
    pairs = zip(fields[::2], fields[1::2], strict=True)
    return {name: value if flag else None for name, (flag, value) in zip(VARIABLES, pairs, strict=True)}


_CAGE = (
    "emupmem runs such lines only where sh can change nothing: with namespaces, or with Landlock (Linux 5.13);"
    " try it as root, and outside of a container"
)


def raise_if_failed(result: Sourced, names: Sequence[str]) -> None:
    if not result.failed:
        return
    index, line, reason = min(len(result.values), len(names) - 1), 0, result.failed
    said = [c for c in result.complaints if c[2] == result.failed]
    if not said:  # exit, or a failing command: what sh said last of that file is the best there is
        said = [c for c in result.complaints if c[0] == index][-1:]
    if said:
        index, line, words = said[0]
        reason = words if words == reason else f"{reason}: {words}"
    place = f"{names[index]}:{line}" if line else names[index]
    if result.unread:
        raise EmupmemError(f"{place}: {printable(reason)}, and sh cannot be kept from doing harm here", _CAGE)
    raise EmupmemError(
        f"{place}: sh cannot read this file: {printable(reason)}",
        "grub-mkconfig sources it with sh and would fail too; repair that line first",
    )
