"""Put our words into the text of /etc/default/grub and take them out again: text in, text out.

Ours are the `memmap=SIZE!START` items of `GRUB_CMDLINE_LINUX` and `GRUB_CMDLINE_LINUX_DEFAULT`;
every other byte belongs to somebody else and stays. Three parties share the work:

* augeas (Shellvars lens, in memory) says *where* a value stands. Its own rendering of the file is
  never used: it eats leading blank lines and bare `#` lines, so the original text is spliced.
* a small scanner of shell quoting says which characters inside the value make up which word.
* `sh` is the judge, because grub-mkconfig *sources* the file: no text leaves `set_items` or
  `remove_items` before `sh` has read the old and the new one and they differ in our items only.

Where the lens gives up (`+=`, `"a"#b`, nested `$( )`) plain lines are found by their shape, and where
no assignment can be edited a line `VAR="$VAR memmap=…"` is appended; the judge is the same. What sh
cannot read, or where it does not agree, is refused with file and line.

Inside, a text is a str of one character per byte (latin-1), so nothing is lost in any encoding.
The one function that starts a process is `run_sh`, in a cage (`emupmem.cage`); nothing else here touches the
machine.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import AnyStr, Protocol, cast

from emupmem.model import UNCHANGED, EmupmemError

LINUX = "GRUB_CMDLINE_LINUX"
DEFAULT = "GRUB_CMDLINE_LINUX_DEFAULT"
VARIABLES = (LINUX, DEFAULT)

MARK = "# added by emupmem"
"""The comment above a line that emupmem appended: only such a line is taken out as a whole."""

SH_SECONDS = 10.0
SH = "/bin/sh"
SH_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NO_PROGRAMS = "/nonexistent"

MOST_WORDS = 4000
"""Words of a file beside its comments. Augeas takes the square of their number: 50 s for 20,000 of them."""

_BLANKS = " \t\n\r\v\f"
_OPAQUE = "\uffff"  # stands for an expansion: never a blank, never part of a word of ours
_NUMBER = r"(?:0[xX][0-9a-fA-F]+|[0-9]+)[KMGTPEkmgtpe]?"
_ITEM = re.compile(f"{_NUMBER}!{_NUMBER}")
_NEW_ITEM = re.compile(r"[1-9][0-9]*[KMGTPE]?![1-9][0-9]*[KMGTPE]?")
_NEW_WORD = re.compile(r"[A-Za-z0-9_.,:=/!-]+")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:=/+@%-]*")  # needs no quotes in sh; no tilde, sh expands it
_INDEX = re.compile(r"\[[0-9]+\]")


# --- what callers see ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variable:
    """One of the two variables as the shell sees it after sourcing the file.

    `value` is None when unset; `items` are ours (`1G!4G`); `words` are split as GRUB and the kernel do
    (`acpi_osi='!Windows 2012'` is one word, quotes kept); `line` is where the last assignment starts,
    0 when none was found.
    """

    name: str
    value: str | None
    line: int
    items: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def is_set(self) -> bool:
        return self.value is not None


@dataclass(frozen=True, slots=True)
class GrubFile:
    """A readable GRUB defaults file. `by_lens` is False when augeas could not parse it.

    `warnings` are oddities that do not prevent an edit, each with file and line.
    """

    filename: str
    linux: Variable
    default: Variable
    by_lens: bool
    warnings: tuple[str, ...] = ()

    def variable(self, name: str) -> Variable:
        """Give one of the two variables by its name; KeyError for another name."""
        return {LINUX: self.linux, DEFAULT: self.default}[name]


@dataclass(frozen=True, slots=True)
class Effective:
    """What a variable is after all files, and who had the last word.

    `filename` and `line` name the deciding assignment (empty and 0: nobody assigns it).
    """

    value: str | None
    filename: str
    line: int
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What `prove` found. `carried` names other variables that take our words over from ours."""

    by_lens: bool
    carried: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
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


def words_of(value: str) -> tuple[str, ...]:
    """Split a value at blanks outside quotes, as GRUB's lexer and the kernel do; quotes are kept.

    Source: grub-core/script/yylex.l, lib/cmdline.c next_arg().
    """
    return tuple(value[a:b] for a, b in _word_spans(value)[0])


def items_of(value: str) -> tuple[str, ...]:
    """List our items (`16G!4G`) in the `memmap=` words of a value, in order."""
    return tuple(item for word in words_of(value) for item in _items_of_word(word))


def read(text: AnyStr, filename: str = "/etc/default/grub", *, sh: Judge | None = None) -> GrubFile:
    """Read both variables as `sh` sees them after sourcing `text`.

    Raises EmupmemError, with file and line, for what cannot be edited safely: NUL bytes, a byte order
    mark, a text that sh cannot read to its end, a carriage return in one of the two values.
    """
    source = _checked(text, filename)
    result = _judged(source, filename, sh or run_sh)
    first, second = (_variable(name, result.values[-1][name], source) for name in VARIABLES)
    warnings = [f"{filename}:{line}: sh: {_shown(reason)}" for _, line, reason in result.complaints]
    warnings += [
        f"{filename}:{v.line}: the value of {v.name} holds a line break; GRUB ends the command there,"
        " what follows does not reach the kernel"
        for v in (first, second)
        if v.value is not None and "\n" in v.value
    ]
    return GrubFile(filename, first, second, _layout(source).nodes is not None, tuple(warnings))


def set_items(
    text: AnyStr,
    variable: str,
    items: Sequence[str],
    extra_words: Sequence[str] = (),
    drop_words: Sequence[str] = (),
    *,
    filename: str = "/etc/default/grub",
    sh: Judge | None = None,
) -> AnyStr:
    """Give the text in which our items are exactly `items` in `variable`, and none in the other one.

    Items of ours that are there already are replaced in place (the first place stays), else the word
    is appended to the last assignment; a variable that nothing assigns gets a line of its own under
    the comment `MARK`. `extra_words` are appended unless they are there, `drop_words` are removed,
    both in `variable` only. The result is proven (see `prove`); without a change it is `text` itself.
    Raises EmupmemError when no edit can be proven; then nothing must be written.
    """
    _check_wishes(variable, items, extra_words, drop_words)
    source = _checked(text, filename)
    judge = sh or run_sh
    before = _judged(source, filename, judge)
    if items or extra_words:
        _check_quotes(variable, before.values[-1][variable], filename, source)
    edit = _Placing.of(variable, items, extra_words, drop_words, before)
    case = _Case(source, before, edit.wishes(), filename, judge, edit.in_place)
    changed = _first_proven(case, (edit.in_place, edit.appended))
    return text if changed == source else _external(changed, text)


def remove_items(
    text: AnyStr,
    items: Sequence[str] | None = None,
    *,
    filename: str = "/etc/default/grub",
    sh: Judge | None = None,
) -> AnyStr:
    """Give the text without our items (all, or those named as `16G!4G`), in both variables.

    A word that becomes empty disappears with one adjoining blank, a line that only emupmem needed with
    its comment. The result is proven; without a change it is `text` itself. Raises EmupmemError.
    """
    source = _checked(text, filename)
    judge = sh or run_sh
    before = _judged(source, filename, judge)
    wishes = {
        name: _Wish(() if items is None else tuple(i for i in items_of(value or "") if i not in items))
        for name, value in before.values[-1].items()
    }

    def strip(source: str) -> str:
        return _stripped(source, items)

    changed = _first_proven(_Case(source, before, wishes, filename, judge, strip), (strip,))
    return text if changed == source else _external(changed, text)


def undo(
    current: AnyStr,
    before: AnyStr,
    after: AnyStr,
    *,
    filename: str = "/etc/default/grub",
    sh: Judge | None = None,
) -> AnyStr:
    """Take the change from `before` to `after` back out of `current`, byte by byte where possible.

    When somebody else changed other lines meanwhile, theirs stay and ours go back to the old bytes;
    when our own lines changed too, our items are removed (`remove_items`, which may raise).
    Neither sh nor augeas is needed for the first two.
    """
    undone = undo_lines(current, before, after)
    return remove_items(current, filename=filename, sh=sh) if undone is None else undone


def undo_lines(current: AnyStr, before: AnyStr, after: AnyStr) -> AnyStr | None:
    """Take the change from `before` to `after` back out of `current`; None where its lines are not there."""
    if current == after:
        return before
    lines = _lines_put_back(_internal(current), _internal(before), _internal(after))
    return None if lines is None else _external("".join(lines), current)


def prove(
    before: AnyStr,
    after: AnyStr,
    variable: str,
    items: Sequence[str],
    *,
    extra_words: Sequence[str] = (),
    drop_words: Sequence[str] = (),
    filename: str = "/etc/default/grub",
    sh: Judge | None = None,
) -> Proof:
    """Prove that `after` is `before` with exactly `items` of ours in `variable` and none elsewhere.

    Both are sourced by sh: the foreign words of both variables are the same in the same order, all other
    variables are equal (what differs between two runs of `before` is not held against us), the
    lens finds the same tree but for our values, and a second edit would change nothing.
    Raises EmupmemError with what is not so.
    """
    _check_wishes(variable, items, extra_words, drop_words)
    source, changed = _checked(before, filename), _checked(after, filename)
    judge = sh or run_sh
    first = _judged(source, filename, judge)
    edit = _Placing.of(variable, items, extra_words, drop_words, first)
    return _prove(_Case(source, first, edit.wishes(), filename, judge, edit.in_place), changed)


def effective(texts: Sequence[tuple[str, bytes | str]], *, sh: Judge | None = None) -> dict[str, Effective]:
    """Source the texts in order, as Debian's grub-mkconfig does with grub.d, and name who decides.

    `texts` are (file name, text): /etc/default/grub first, then grub.d/*.cfg in glob order.
    Raises EmupmemError when sh cannot read one of them to its end.
    """
    sources = [_checked(text, name) for name, text in texts]
    result = (sh or run_sh)([s.encode("latin-1") for s in sources])
    _raise_if_failed(result, [name for name, _ in texts])
    return {name: _last_word(name, [n for n, _ in texts], sources, result) for name in VARIABLES}


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
    Raises EmupmemError when it cannot be started or does not finish. The texts travel in sealed memory
    files: a pipe of root's cannot be re-opened by nobody, and a script on stdin could be eaten by the
    commands in it.
    """
    from emupmem import cage

    programs = path != NO_PROGRAMS
    with contextlib.ExitStack() as stack:
        try:
            way = cage.best(SH, programs=programs)
            if way is None and (refused := _more_than_plain(texts)):
                return refused
            files = tuple(stack.enter_context(_memory_file(text)) for text in texts)
            job = cage.Job(SH, _script(files), files, path, programs)
            out, err, status = cage.run(job, way, SH_SECONDS)
        except (OSError, ValueError, cage.CageError) as exc:
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


_NAME = r"[A-Za-z_]\w*"
_HARMLESS_LINE = re.compile(
    rf"""[ \t]*(?:(?:export[ \t]+)?(?:GRUB|SUSE)_\w*=
    (?:[A-Za-z0-9_.,:=/+@%^!-]|\\[^\n]|'[^']*'|"(?:[^"\\$`]|\\.|\${_NAME}|\$\{{{_NAME}\}})*")*+)?
    [ \t]*(?:(?<!\S)\#[^\n]*)?(?:\n|\Z)""",
    re.S | re.A | re.X,
)


def _more_than_plain(texts: Sequence[bytes]) -> Sourced | None:
    """The refusal of the first line that does more than set a variable of GRUB; None: there is none.

    A name of the shell's own is no such variable: bash runs commands in what is assigned to RANDOM.
    """
    for index, text in enumerate(texts):
        source, at = text.decode("latin-1"), 0
        while at < len(source) and (found := _HARMLESS_LINE.match(source, at)):
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


def _raise_if_failed(result: Sourced, names: Sequence[str]) -> None:
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
        raise EmupmemError(f"{place}: {_shown(reason)}, and sh cannot be kept from doing harm here", _CAGE)
    raise EmupmemError(
        f"{place}: sh cannot read this file: {_shown(reason)}",
        "grub-mkconfig sources it with sh and would fail too; repair that line first",
    )


def _judged(source: str, filename: str, judge: Judge) -> Sourced:
    """Source one text and refuse what makes every further step meaningless."""
    result = judge([source.encode("latin-1")])
    _raise_if_failed(result, [filename])
    for name, value in result.values[-1].items():
        if value is not None and "\r" in value:
            line = _line_of(name, source)
            raise EmupmemError(
                f"{filename}:{line}: the value of {name} contains a carriage return (DOS line ends)",
                f"sh keeps it as part of the value; remove them: sed -i 's/\\r$//' {filename}",
            )
    return result


# --- the scanner of shell quoting --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unit:
    """One character of a value and the slice of the raw text that writes it."""

    start: int
    end: int
    char: str


class _OddValueError(Exception):
    """The raw text of a value is not what the scanner understands; another way must be found."""


def _units(raw: str) -> tuple[list[_Unit], str]:
    """Scan a raw value; give its characters and the quote that closes it at the very end, or ''."""
    try:
        return _scanned(raw)
    except RecursionError:  # hundreds of expansions in expansions
        raise _OddValueError from None


def _scanned(raw: str) -> tuple[list[_Unit], str]:
    units: list[_Unit] = []
    quote = tail = ""
    at = 0
    while at < len(raw):
        char, tail = raw[at], ""
        if quote != "'" and char == "\\":
            at = _escape(raw, at, quote, units)
        elif char == quote:
            quote, tail, at = "", char, at + 1
        elif not quote and char in "'\"":
            quote, at = char, at + 1
        elif quote != "'" and char in "$`":
            end = _expansion_end(raw, at)
            units.append(_Unit(at, end, _OPAQUE if end > at + 1 else char))
            at = end
        else:
            units.append(_Unit(at, at + 1, char))
            at += 1
    if quote:
        raise _OddValueError
    return units, tail


def _escape(raw: str, at: int, quote: str, units: list[_Unit]) -> int:
    following = raw[at + 1 : at + 2]
    if following == "\n":
        return at + 2  # a continued line: no character at all
    if following and (not quote or following in '$`"\\'):
        units.append(_Unit(at, at + 2, following))
        return at + 2
    units.append(_Unit(at, at + 1, "\\"))
    return at + 1


def _expansion_end(raw: str, at: int) -> int:
    """Find where the expansion at `at` ends; `at + 1` when the `$` stands for itself."""
    if raw[at] == "`":
        return _closing(raw, at + 1, "`")
    if raw.startswith("$(", at):
        return _closing(raw, at + 2, ")")
    if raw.startswith("${", at):
        return _closing(raw, at + 2, "}")
    found = re.compile(r"\$(?:[A-Za-z_]\w*|[0-9@*#?$!-])", re.A).match(raw, at)
    return found.end() if found else at + 1


def _closing(raw: str, at: int, close: str) -> int:
    while at < len(raw):
        char = raw[at]
        if char == close:
            return at + 1
        if char == "\\":
            at += 2
        elif close == "`":
            at += 1
        elif char == "'" and close == ")":
            at = _closing_single(raw, at + 1)
        elif char == '"':
            at = _closing(raw, at + 1, '"')
        elif char == "(" and close == ")":
            at = _closing(raw, at + 1, ")")
        elif char in "$`":
            at = _expansion_end(raw, at)
        else:
            at += 1
    raise _OddValueError


def _closing_single(raw: str, at: int) -> int:
    end = raw.find("'", at)
    if end < 0:
        raise _OddValueError
    return end + 1


def _word_spans(value: str) -> tuple[list[tuple[int, int]], bool]:
    """Split at blanks outside quotes; also tell whether all quotes are closed."""
    spans: list[tuple[int, int]] = []
    quote, start, at = "", -1, 0
    while at < len(value):
        char = value[at]
        if not quote and char in _BLANKS:
            if start >= 0:
                spans.append((start, at))
            start, at = -1, at + 1
            continue
        if start < 0:
            start = at
        if char == "\\" and quote != "'":
            at += 1
        elif char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        at += 1
    if start >= 0:
        spans.append((start, len(value)))
    return spans, not quote


def _items_of_word(word: str) -> list[str]:
    if not word.startswith("memmap="):
        return []
    return [part for part in word.removeprefix("memmap=").split(",") if _ITEM.fullmatch(part)]


def without_items(word: str) -> str:
    """The word without our items, empty when nothing is left."""
    if not _items_of_word(word):
        return word
    parts = [p for p in word.removeprefix("memmap=").split(",") if not _ITEM.fullmatch(p)]
    return f"memmap={','.join(parts)}" if parts else ""


# --- edits of one raw value --------------------------------------------------------------------------


def _reworked(
    raw: str, replacement: Sequence[str], names: Sequence[str] | None, drop: Sequence[str] = ()
) -> str:
    """Put `replacement` where the first item of ours stands and delete the further ones.

    Only items in `names` are touched (None: all). Foreign items of the same comma list stay; a word that
    becomes empty goes with one adjoining blank.
    """
    try:
        units, _ = _units(raw)
    except _OddValueError:
        return raw  # left alone; when there is something of ours in it, sh will tell
    value = "".join(u.char for u in units)
    gone: set[int] = set()
    put: dict[int, str] = {}
    fresh = ",".join(replacement)
    for start, end in _word_spans(value)[0]:
        word = value[start:end]
        if word in drop:
            _take_word(gone, value, start, end)
            continue
        left = 0
        parts = _parts(word, start)
        for first, last in parts:
            item = value[first:last]
            if not _ITEM.fullmatch(item) or (names is not None and item not in names):
                left += 1
            elif fresh:
                gone.update(range(first, last))
                put[first], fresh = fresh, ""
                left += 1
            else:
                _take_part(gone, parts, first, last)
        if parts and not left:
            _take_word(gone, value, start, end)
    return _spliced_units(raw, units, gone, put)


def _parts(word: str, start: int) -> list[tuple[int, int]]:
    """Where the items of a `memmap=` word stand; nothing for a word without an item of ours."""
    if not _items_of_word(word):
        return []
    at = start + len("memmap=")
    parts = []
    for part in word.removeprefix("memmap=").split(","):
        parts.append((at, at + len(part)))
        at += len(part) + 1
    return parts


def _take_part(gone: set[int], parts: Sequence[tuple[int, int]], first: int, last: int) -> None:
    """Delete an item with one comma: the one before it, or the one behind where none is left before."""
    gone.update(range(first, last))
    if first > parts[0][0] and first - 1 not in gone:
        gone.add(first - 1)
    elif last < parts[-1][1]:
        gone.add(last)


def _take_word(gone: set[int], value: str, start: int, end: int) -> None:
    gone.update(range(start, end))
    if start and value[start - 1] in _BLANKS and start - 1 not in gone:
        gone.add(start - 1)
    elif end < len(value) and value[end] in _BLANKS:
        gone.add(end)


def _spliced_units(raw: str, units: Sequence[_Unit], gone: set[int], put: Mapping[int, str]) -> str:
    out, at = [], 0
    for index, unit in enumerate(units):
        if index in gone:
            out += [raw[at : unit.start], put.get(index, "")]
            at = unit.end
    return "".join([*out, raw[at:]])


def _appended(raw: str, words: str) -> str:
    """Add words at the end of a raw value, inside its last quotes; quotes are added where needed."""
    units, tail = _units(raw)
    text = f" {words}" if units else words
    if tail:
        return f"{raw[:-1]}{text}{tail}"
    if _PLAIN.fullmatch(raw):
        return f'"{raw}{text}"'
    return f'{raw}"{text}"'


# --- where the values stand ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Assignment:
    """An assignment of one of the two variables: offsets of the raw value; `top` outside if and case."""

    name: str
    start: int
    end: int
    top: bool
    line: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the two variables are assigned, in order; `nodes` is the lens's tree, None if it failed."""

    assignments: tuple[_Assignment, ...]
    nodes: tuple[tuple[str, str], ...] | None
    error_line: int = 0

    def of(self, name: str) -> list[_Assignment]:
        return [a for a in self.assignments if a.name == name]


class _Augeas(Protocol):
    """What is used of python-augeas, which has no types."""

    def set(self, path: str, value: str) -> None: ...
    def get(self, path: str) -> str | bytes | None: ...
    def match(self, path: str) -> list[str]: ...
    def remove(self, path: str) -> int: ...
    def span(self, path: str) -> tuple[str, int, int, int, int, int, int]: ...
    def text_store(self, lens: str, node: str, path: str) -> None: ...


_AUGEAS_HINT = "install python-augeas and libaugeas (Debian: apt install python3-augeas augeas-lenses)"


@lru_cache(maxsize=1)
def _augeas() -> _Augeas:
    """Start augeas without loading any file or lens: 0.08 s with the first text instead of 1 s."""
    try:
        augeas = importlib.import_module("augeas")  # late: not every command needs it
        # NO_LOAD, NO_MODL_AUTOLOAD, ENABLE_SPAN; as numbers because 0.5 does not name them all
        return cast(_Augeas, augeas.Augeas(flags=1 << 5 | 1 << 6 | 1 << 7))
    except (ImportError, OSError, AttributeError, RuntimeError, ValueError) as exc:
        raise EmupmemError(f"cannot use augeas to edit GRUB settings: {exc}", _AUGEAS_HINT) from exc


@lru_cache(maxsize=16)
def _layout(source: str) -> _Layout:
    """Find the assignments with the lens, or by the shape of plain lines where it gives up."""
    tree = _augeas()
    for path in ("/emupmem", "/augeas/text"):
        tree.remove(path)
    # text_store refuses a missing final newline
    tree.set("/emupmem/in", source if source.endswith("\n") else f"{source}\n")
    try:
        tree.text_store("Shellvars.lns", "/emupmem/in", "/emupmem/tree")
    except (ValueError, RuntimeError) as exc:
        line = tree.get("/augeas/text/emupmem/tree/error/line")
        if tree.get("/augeas/text/emupmem/tree/error") != "parse_failed":
            raise EmupmemError(f"augeas has no Shellvars lens: {exc}", _AUGEAS_HINT) from exc
        return _Layout(_plain_lines(source), None, int(line or 0))
    return _from_tree(tree, source)


def _from_tree(tree: _Augeas, source: str) -> _Layout:
    encoded = source.encode()  # spans count bytes of what augeas was given

    def offset(position: int) -> int:
        return position if source.isascii() else len(encoded[:position].decode())

    nodes, found = [], []
    for path in tree.match("/emupmem/tree//*"):
        plain = _INDEX.sub("", path.removeprefix("/emupmem/tree/"))
        value = tree.get(path)
        nodes.append((plain, value if isinstance(value, str) else ""))
        name = plain.rsplit("/", 1)[-1]
        if name in VARIABLES and value is not None:  # None: `export NAME` without a value
            _, _, _, start, end, *_ = tree.span(path)
            start, end = offset(start), offset(end)
            line = source.count("\n", 0, start) + 1
            found.append(_Assignment(name, start, end, plain == name, line))
    found.sort(key=lambda a: a.start)
    return _Layout(tuple(found), tuple(nodes))


_PLAIN_LINE = re.compile(
    r"^(?P<indent>[ \t]*)(?:export[ \t]+)?(?P<name>GRUB_CMDLINE_LINUX(?:_DEFAULT)?)="
    r"(?P<raw>\"(?:[^\"`$\\\n]|\$(?P=name)\b)*\"|'[^'\n]*'|[A-Za-z0-9_.,:=/+@%!-]*)"
    r"(?=[ \t]*(?:;|\Z|\n|[ \t]\#))",
    re.M | re.A,
)


def _plain_lines(source: str) -> tuple[_Assignment, ...]:
    return tuple(
        _Assignment(
            m["name"],
            m.start("raw"),
            m.end("raw"),
            not m["indent"],
            source.count("\n", 0, m.start("raw")) + 1,
        )
        for m in _PLAIN_LINE.finditer(source)
    )


def _line_of(name: str, source: str) -> int:
    """The line of the last assignment, those outside if and case first; 0 when there is none."""
    mine = _layout(source).of(name)
    last = next((a for a in reversed(mine) if a.top), mine[-1] if mine else None)
    return last.line if last else _mention(name, source)


def _variable(name: str, value: str | None, source: str) -> Variable:
    shown = None if value is None else _shown(value)
    words = words_of(shown or "")
    return Variable(name, shown, _line_of(name, source), items_of(shown or ""), words)


def _last_word(name: str, names: Sequence[str], sources: Sequence[str], result: Sourced) -> Effective:
    value: str | None = None
    who = -1
    for index, values in enumerate(result.values):
        if values[name] != value or any(a.top for a in _layout(sources[index]).of(name)):
            value, who = values[name], index
    line = _line_of(name, sources[who]) if who >= 0 else 0
    shown = None if value is None else _shown(value)
    return Effective(shown, names[who] if who >= 0 else "", line, items_of(shown or ""))


def _mention(name: str, source: str) -> int:
    """The last line that looks like an assignment, whatever lens and plain lines make of it; or 0."""
    lines = [m.start() for m in re.finditer(rf"^[^#\n]*\b{name}\+?=", source, re.M | re.A)]
    return source.count("\n", 0, lines[-1]) + 1 if lines else 0


# --- edits of a whole text -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a variable shall hold: these items of ours, words added at the end, words taken out."""

    items: tuple[str, ...]
    extra: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Placing:
    """The edit of `set_items`, as pure functions from text to text."""

    variable: str
    items: tuple[str, ...]
    extra: tuple[str, ...]
    drop: tuple[str, ...]
    is_set: bool

    @classmethod
    def of(
        cls, variable: str, items: Sequence[str], extra: Sequence[str], drop: Sequence[str], now: Sourced
    ) -> _Placing:
        value = now.values[-1][variable]
        missing = tuple(dict.fromkeys(w for w in extra if w not in words_of(value or "")))
        return cls(variable, tuple(items), missing, tuple(drop), value is not None)

    def wishes(self) -> dict[str, _Wish]:
        return {**{n: _Wish(()) for n in VARIABLES}, self.variable: _Wish(self.items, self.extra, self.drop)}

    def in_place(self, source: str) -> str:
        """Edit the assignments that are there; append a line where there is none to edit."""
        layout = _layout(source)
        mine = layout.of(self.variable)
        raws = {a: source[a.start : a.end] for a in layout.assignments}
        live = _live(mine, source)
        target = next((a for a in live if a.top and _items_in(raws[a])), None)
        present = [(a in live, item) for a in mine for item in _items_in(raws[a])]
        keep = present == [(True, item) for item in self.items]  # as wished, and nothing in dead lines
        for a in layout.assignments:
            if a.name != self.variable:
                raws[a] = _reworked(raws[a], (), None)
            elif keep:
                raws[a] = _reworked(raws[a], (), (), self.drop)
            else:
                raws[a] = _reworked(raws[a], self.items if a is target else (), None, self.drop)
        words = self._new_words([raws[a] for a in live], not keep and not target)
        last = next((a for a in reversed(mine) if a.top), None)
        if last and layout.nodes is None and last.line < _mention(self.variable, source):
            last = None  # plain lines only are known, and something later may be the one that counts
        if words and last:
            raws[last] = _appended(raws[last], words)
        spliced = _without_own_lines(source, _spliced(source, raws))
        if words and not last:
            return _with_line(spliced, self.variable, words, self.is_set or bool(mine))
        return spliced

    def appended(self, source: str) -> str:
        """Take ours out everywhere and add a line that extends whatever value there is."""
        raws = {}
        for a in _layout(source).assignments:
            drop = self.drop if a.name == self.variable else ()
            raws[a] = _reworked(source[a.start : a.end], (), None, drop)
        words = self._new_words([raw for a, raw in raws.items() if a.name == self.variable], True)
        spliced = _without_own_lines(source, _spliced(source, raws))
        return _with_line(spliced, self.variable, words, True) if words else spliced

    def _new_words(self, raws: Sequence[str], with_items: bool) -> str:
        there = {word for raw in raws for word in _words_in(raw)}
        words = [f"memmap={','.join(self.items)}"] if self.items and with_items else []
        return " ".join(words + [w for w in self.extra if w not in there])


def _stripped(source: str, names: Sequence[str] | None) -> str:
    raws = {a: _reworked(source[a.start : a.end], (), names) for a in _layout(source).assignments}
    return _without_own_lines(source, _spliced(source, raws))


def _live(mine: Sequence[_Assignment], source: str) -> list[_Assignment]:
    """The assignments that the value is made of: the last one, and those before while it extends them."""
    live: list[_Assignment] = []
    for a in reversed(mine):
        live.insert(0, a)
        if a.top and not re.search(rf"\$\{{?{a.name}\b", source[a.start : a.end], re.A):
            break
    return live


def _words_in(raw: str) -> tuple[str, ...]:
    try:
        return words_of("".join(u.char for u in _units(raw)[0]))
    except _OddValueError:
        return ()


def _items_in(raw: str) -> list[str]:
    return [item for word in _words_in(raw) for item in _items_of_word(word)]


def _spliced(source: str, raws: Mapping[_Assignment, str]) -> str:
    out, at = [], 0
    for a in sorted(raws, key=lambda a: a.start):
        out += [source[at : a.start], raws[a]]
        at = a.end
    return "".join([*out, source[at:]])


def _with_line(source: str, name: str, words: str, extend: bool) -> str:
    # A missing final newline stays missing, so that taking the line out gives the old bytes back.
    line = f'{MARK}\n{name}="{f"${name} " if extend else ""}{words}"'
    if not source or source.endswith("\n"):
        return f"{source}{line}\n"
    return f"{source}\n{line}"


_OWN_LINE = re.compile(rf'^{MARK}\n({"|".join(VARIABLES)})="(?:\$\1)?"(?:\n|(?P<bare>\Z))', re.M)


def _without_own_lines(source: str, changed: str) -> str:
    """Take out lines that emupmem appended and that hold nothing any more."""
    if changed == source:
        return source
    while found := _OWN_LINE.search(changed):
        start = found.start() - (1 if found["bare"] is not None and found.start() else 0)
        changed = changed[:start] + changed[found.end() :]
    return changed


# --- the proof -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """What is to be proven of an edited text; `again` is the edit, which must change nothing more."""

    source: str
    before: Sourced
    wishes: Mapping[str, _Wish]
    filename: str
    judge: Judge
    again: Callable[[str], str]


def _first_proven(case: _Case, edits: Sequence[Callable[[str], str]]) -> str:
    """Give the result of the first edit that can be proven; raise the reason of the first that cannot."""
    reason: EmupmemError | None = None
    for edit in edits:
        try:
            changed = edit(case.source)
            _prove(case, changed)
        except _OddValueError:
            continue
        except EmupmemError as exc:
            reason = reason or exc
        else:
            return changed
    line = max(_line_of(name, case.source) for name in VARIABLES)
    raise reason or EmupmemError(
        f"{case.filename}:{line}: the quotes of this value are not understood",
        "write it as one quoted string",
    )


def _prove(case: _Case, changed: str) -> Proof:
    layout = _layout(case.source)
    if layout.nodes is not None:
        _same_tree(layout, _layout(changed), case.filename)
    before = case.before
    after = before if changed == case.source else case.judge([changed.encode("latin-1")])
    if after.failed:
        reason = _shown("; ".join([after.failed, *(c[2] for c in after.complaints[-1:])]))
        raise EmupmemError(
            f"{case.filename}: sh could not read the edited file: {reason}", _BY_HAND, state=UNCHANGED
        )
    problem = _disagreement(case, after, before)
    if problem:  # what differs between two runs of the same text is not our doing
        again = case.judge([case.source.encode("latin-1")])
        problem = problem if again.failed else _disagreement(case, after, again)
    if problem:
        raise problem
    if case.again(changed) != changed:
        raise EmupmemError(
            f"{case.filename}: a second edit would change the file again", _BY_HAND, state=UNCHANGED
        )
    carried = tuple(n for n, old in before.rest.items() if _carries(old, after.rest.get(n), before, after))
    return Proof(layout.nodes is not None, carried)


_BY_HAND = "edit that line by hand, or put the argument into the other variable"


def _same_tree(before: _Layout, after: _Layout, filename: str) -> None:
    """Compare the two trees but for the values of our variables and our own comment."""

    def others(layout: _Layout) -> list[tuple[str, str]]:
        return [
            (path, value)
            for path, value in layout.nodes or ()
            if path.rsplit("/", 1)[-1] not in VARIABLES and value != MARK.removeprefix("# ")
        ]

    if after.nodes is None:
        raise EmupmemError(
            f"{filename}:{after.error_line}: augeas could not read the edited file", _BY_HAND, state=UNCHANGED
        )
    if others(before) != others(after):
        raise EmupmemError(
            f"{filename}: augeas sees more changed than our arguments", _BY_HAND, state=UNCHANGED
        )


def _disagreement(case: _Case, after: Sourced, again: Sourced) -> EmupmemError | None:
    """Say what sh reads differently than intended; `again` tells what is unstable by itself."""
    before = case.before
    for name, wish in case.wishes.items():
        old, new = before.values[-1][name], after.values[-1][name]
        problem = _wrong_items(new, wish) or _wrong_words(old, new, again.values[-1][name], wish)
        if problem:
            line = _line_of(name, case.source) or _layout(case.source).error_line
            place = f"{case.filename}:{line}" if line else case.filename
            return EmupmemError(
                f"{place}: after the edit sh would read {name} with {problem}", _BY_HAND, state=UNCHANGED
            )
    for name in sorted(before.rest.keys() | after.rest.keys()):
        was, now = before.rest.get(name), after.rest.get(name)
        if was != now and again.rest.get(name) == was and not _carries(was, now, before, after):
            return EmupmemError(
                f"{case.filename}: the edit would change {name} as well", _BY_HAND, state=UNCHANGED
            )
    return None


def _wrong_items(new: str | None, wish: _Wish) -> str:
    items = items_of(new or "")
    if items == wish.items:
        return ""
    found = f"memmap={','.join(items)}" if items else "no memmap= of ours"
    wanted = f"memmap={','.join(wish.items)}" if wish.items else "none"
    return f"{found} instead of {wanted} (another assignment, command or variable decides)"


def _wrong_words(old: str | None, new: str | None, again: str | None, wish: _Wish) -> str:
    if old is None and new is not None and not wish.items and not wish.extra:
        return "a value where it had none"
    if old is not None and new is None and (_others(old, wish.drop) or not items_of(old)):
        return "no value any more"  # fine where the value was ours alone: our own line is gone
    if left := [w for w in words_of(new or "") if w in wish.drop]:
        return f"{left[0]} still in it"
    was, repeat = ([*_others(v, wish.drop), *wish.extra] for v in (old, again))
    now = _others(new, wish.drop)
    if was == repeat and now != was:
        return f"the other words changed: {_shown(' '.join(now))}"
    if len(was) == len(repeat) == len(now):
        unlike = [b for a, b, c in zip(was, now, repeat, strict=True) if a == c and a != b]
        if unlike:
            return f"the other words changed: {_shown(' '.join(unlike))}"
    return ""


def _others(value: str | None, drop: Sequence[str]) -> list[str]:
    words = (without_items(w) for w in words_of(value or "") if w not in drop)
    return [w for w in words if w]


def _carries(old: str | None, new: str | None, before: Sourced, after: Sourced) -> bool:
    """Whether a variable differs only because it is made from one of ours (`RECOVERY="$… single"`)."""
    if old is None or new is None or old == new:
        return False
    for name in VARIABLES:
        was, now = before.values[-1][name] or "", after.values[-1][name] or ""
        if now and now != was and new.replace(now, was).replace("'", "") == old.replace("'", ""):
            return True
        if was and now != was and old.replace(was, now).replace("'", "") == new.replace("'", ""):
            return True
    return False


# --- undo ------------------------------------------------------------------------------------------------


def _lines_put_back(current: str, before: str, after: str) -> list[str] | None:
    """Replace each block of lines that `after` changed by the old one; None unless all are found once."""
    lines, old, new = (_lines(text) for text in (current, before, after))
    moves = []
    for i1, i2, j1, j2 in _changed_blocks(old, new):
        if j1 == j2 and j1:  # nothing of ours to look for: the line before marks the place
            i1, j1 = i1 - 1, j1 - 1  # noqa: PLW2901
        places = [n for n in range(len(lines)) if j1 < j2 and lines[n : n + j2 - j1] == new[j1:j2]]
        if len(places) != 1:
            return None
        moves.append((places[0], j2 - j1, old[i1:i2]))
    moves.sort()
    if any(at + count > following for (at, count, _), (following, _, _) in pairwise(moves)):
        return None  # two blocks of the same lines, of which somebody left only one
    for at, count, block in reversed(moves):
        lines[at : at + count] = block
    if any(not line.endswith("\n") for line in lines[:-1]):
        return None
    return lines


_MOST_PAIRS = 4_000_000
"""Of lines, that difflib may have to compare: it takes the square of what repeats."""


def _changed_blocks(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Where lines differ: (from, to) in the old text and in the new one. Equal ends are left out first."""
    most = min(len(old), len(new))
    head = next((n for n in range(most) if old[n] != new[n]), most)
    tail = next((n for n in range(most - head) if old[-1 - n] != new[-1 - n]), most - head)
    left, right = old[head : len(old) - tail], new[head : len(new) - tail]
    if len(left) * len(right) > _MOST_PAIRS:
        return [(head, head + len(left), head, head + len(right))]
    middle = difflib.SequenceMatcher(None, left, right, autojunk=False)
    return [
        (head + i1, head + i2, head + j1, head + j2)
        for tag, i1, i2, j1, j2 in middle.get_opcodes()
        if tag != "equal"
    ]


def _lines(text: str) -> list[str]:
    # not splitlines(): only a newline ends a line of a file, and undo must keep every byte
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# --- texts and wishes ------------------------------------------------------------------------------------


def _internal(text: str | bytes) -> str:
    return (text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")).decode("latin-1")


def _external(source: str, like: AnyStr) -> AnyStr:
    data = source.encode("latin-1")
    return data if isinstance(like, bytes) else data.decode("utf-8", "surrogateescape")


def _shown(source: str) -> str:
    return source.encode("latin-1").decode("utf-8", "surrogateescape")


def _checked(text: str | bytes, filename: str) -> str:
    source = _internal(text)
    if "\0" in source:
        line = source.count("\n", 0, source.index("\0")) + 1
        raise EmupmemError(
            f"{filename}:{line}: contains a NUL byte", "this is no text for sh; restore the file"
        )
    if source.startswith(("\xef\xbb\xbf", "\xff\xfe", "\xfe\xff")):
        raise EmupmemError(
            f"{filename}:1: starts with a byte order mark, which sh takes for a command",
            f"remove it: sed -i '1s/^\\xef\\xbb\\xbf//' {filename}",
        )
    if sum(len(line.split()) for line in source.split("\n") if line[:1] != "#") > MOST_WORDS:
        raise EmupmemError(
            f"{filename}: more than {MOST_WORDS} words, which no settings of GRUB have",
            "restore the file, or move what is not for GRUB out of it",
        )
    return source


def _check_wishes(
    variable: str, items: Sequence[str], extra_words: Sequence[str], drop_words: Sequence[str]
) -> None:
    if variable not in VARIABLES:
        raise EmupmemError(f"{variable} is not a variable of kernel arguments", f"use {LINUX} or {DEFAULT}")
    for item in items:
        if not _NEW_ITEM.fullmatch(item):
            raise EmupmemError(f"not an item of memmap=: {item}", "SIZE!START is, for example 16G!4G")
    for word in extra_words:
        if not _NEW_WORD.fullmatch(word) or _items_of_word(word) or word in drop_words:
            raise EmupmemError(f"not a word that can be added: {word}", "plain kernel arguments only")


def _check_quotes(name: str, value: str | None, filename: str, source: str) -> None:
    if value is not None and not _word_spans(value)[1]:
        raise EmupmemError(
            f"{filename}:{_line_of(name, source)}: the value of {name} has a quote that is never closed",
            "GRUB would swallow an added argument; close or remove the quote first",
        )
