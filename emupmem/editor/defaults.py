# SPDX-License-Identifier: Apache-2.0
"""Put our words into the text of /etc/default/grub and take them out again: text in, text out.

Ours are the reservations (`memmap=SIZE!START`, `memmap=SIZE%START-1+0xefffffff`) in `GRUB_CMDLINE_LINUX` and
`GRUB_CMDLINE_LINUX_DEFAULT`; every other byte belongs to somebody else and stays. Three parties share the work:

* augeas (Shellvars lens, in memory) says *where* a value stands. Its own rendering of the file is
  never used: it eats leading blank lines and bare `#` lines, so the original text is spliced.
* a small scanner of shell quoting says which characters inside the value make up which word.
* `sh` is the judge, because grub-mkconfig *sources* the file: no text leaves `set_items` or
  `remove_items` before `sh` has read the old and the new one and they differ in our items only.

Where the lens gives up (`+=`, `"a"#b`, nested `$( )`) plain lines are found by their shape, and where
no assignment can be edited a line `VAR="$VAR memmap=…"` is appended; the judge is the same. What sh
cannot read, or where it does not agree, is refused with file and line.

Inside, a text is a str of one character per byte (latin-1), so nothing is lost in any encoding.
The one function that starts a process is `run_sh`, in a cage (`emupmem.editor.cage`); nothing else here touches the
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import AnyStr

from emupmem.editor import shell
from emupmem.editor.edits import Placing, WantedWords, stripped, undo_lines
from emupmem.editor.lens import layout_of, line_of
from emupmem.editor.proof import EditCase, Proof, first_proven, prove_case
from emupmem.editor.quoting import items_of, word_spans, words_of
from emupmem.editor.shell import Judge, Sourced, raise_if_failed
from emupmem.editor.text import (
    DEFAULT,
    LINUX,
    VARIABLES,
    check_wanted_words,
    checked_text,
    external,
    printable,
)
from emupmem.model import EmupmemError
from emupmem.record import record

# --- what callers see ------------------------------------------------------------------------------


@record
class Variable:
    """One of the two variables as the shell sees it after sourcing the file.

    `value` is None when unset; `items` are ours (`1G!4G`); `words` are split as GRUB and the kernel do
    (`acpi_osi='!Windows 2012'` is one word, quotes kept); `line` is where the last assignment in `source` starts,
    0 when none was found: the lens takes a twentieth of a second, and is asked when somebody wants to know.
    """

    name: str
    value: str | None
    items: tuple[str, ...]
    words: tuple[str, ...]
    source: str = field(repr=False)

    @property
    def line(self) -> int:
        return line_of(self.name, self.source)

    @property
    def is_set(self) -> bool:
        return self.value is not None


@record
class GrubFile:
    """A readable GRUB defaults file. `by_lens` is False when augeas could not parse it.

    `warnings` are oddities that do not prevent an edit, each with file and line.
    """

    filename: str
    linux: Variable
    default: Variable
    warnings: tuple[str, ...] = ()

    @property
    def by_lens(self) -> bool:
        return layout_of(self.linux.source).nodes is not None

    def variable(self, name: str) -> Variable:
        """Give one of the two variables by its name; KeyError for another name."""
        return {LINUX: self.linux, DEFAULT: self.default}[name]


@record
class Effective:
    """What a variable is after all files, and who had the last word.

    `filename` and `line` name the deciding assignment, of `name` in `source` (empty and 0: nobody assigns it).
    """

    value: str | None
    filename: str
    items: tuple[str, ...]
    name: str = ""
    source: str = field(default="", repr=False)

    @property
    def line(self) -> int:
        return line_of(self.name, self.source) if self.filename else 0


def read_grub_file(text: AnyStr, filename: str = "/etc/default/grub", *, sh: Judge | None = None) -> GrubFile:
    """Read both variables as `sh` sees them after sourcing `text`.

    Raises EmupmemError, with file and line, for what cannot be edited safely: NUL bytes, a byte order
    mark, a text that sh cannot read to its end, a carriage return in one of the two values.
    """
    source = checked_text(text, filename)
    result = _judged(source, filename, sh or shell.run_sh)
    first, second = (_variable(name, result.values[-1][name], source) for name in VARIABLES)
    warnings = [f"{filename}:{line}: sh: {printable(reason)}" for _, line, reason in result.complaints]
    warnings += [
        f"{filename}:{v.line}: the value of {v.name} holds a line break; GRUB ends the command there,"
        " what follows does not reach the kernel"
        for v in (first, second)
        if v.value is not None and "\n" in v.value
    ]
    return GrubFile(filename, first, second, tuple(warnings))


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
    check_wanted_words(variable, items, extra_words, drop_words)
    source = checked_text(text, filename)
    judge = sh or shell.run_sh
    before = _judged(source, filename, judge)
    if items or extra_words:
        _check_quotes(variable, before.values[-1][variable], filename, source)
    edit = Placing.of(variable, items, extra_words, drop_words, before)
    if edit.is_there(source, before):
        return text
    case = EditCase(source, before, edit.wishes(), filename, judge, edit.in_place)
    changed = first_proven(case, (edit.in_place, edit.appended))
    return text if changed == source else external(changed, text)


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
    source = checked_text(text, filename)
    judge = sh or shell.run_sh
    before = _judged(source, filename, judge)
    wishes = {
        name: WantedWords(() if items is None else tuple(i for i in items_of(value or "") if i not in items))
        for name, value in before.values[-1].items()
    }

    def strip(source: str) -> str:
        return stripped(source, items)

    changed = first_proven(EditCase(source, before, wishes, filename, judge, strip), (strip,))
    return text if changed == source else external(changed, text)


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
    check_wanted_words(variable, items, extra_words, drop_words)
    source, changed = checked_text(before, filename), checked_text(after, filename)
    judge = sh or shell.run_sh
    first = _judged(source, filename, judge)
    edit = Placing.of(variable, items, extra_words, drop_words, first)
    return prove_case(EditCase(source, first, edit.wishes(), filename, judge, edit.in_place), changed)


def effective(texts: Sequence[tuple[str, bytes | str]], *, sh: Judge | None = None) -> dict[str, Effective]:
    """Source the texts in order, as Debian's grub-mkconfig does with grub.d, and name who decides.

    `texts` are (file name, text): /etc/default/grub first, then grub.d/*.cfg in glob order.
    Raises EmupmemError when sh cannot read one of them to its end.
    """
    sources = [checked_text(text, name) for name, text in texts]
    result = (sh or shell.run_sh)([s.encode("latin-1") for s in sources])
    raise_if_failed(result, [name for name, _ in texts])
    return {name: _last_word(name, [n for n, _ in texts], sources, result) for name in VARIABLES}


def _judged(source: str, filename: str, judge: Judge) -> Sourced:
    """Source one text and refuse what makes every further step meaningless."""
    result = judge([source.encode("latin-1")])
    raise_if_failed(result, [filename])
    for name, value in result.values[-1].items():
        if value is not None and "\r" in value:
            line = line_of(name, source)
            raise EmupmemError(
                f"{filename}:{line}: the value of {name} contains a carriage return (DOS line ends)",
                f"sh keeps it as part of the value; remove them: sed -i 's/\\r$//' {filename}",
            )
    return result


def _variable(name: str, value: str | None, source: str) -> Variable:
    shown = None if value is None else printable(value)
    return Variable(name, shown, items_of(shown or ""), words_of(shown or ""), source)


def _last_word(name: str, names: Sequence[str], sources: Sequence[str], result: Sourced) -> Effective:
    value: str | None = None
    who = -1
    for index, values in enumerate(result.values):
        source = sources[index]
        if values[name] != value or (name in source and any(a.top for a in layout_of(source).of(name))):
            value, who = values[name], index
    if who < 0:
        return Effective(None, "", ())
    shown = None if value is None else printable(value)
    return Effective(shown, names[who], items_of(shown or ""), name, sources[who])


def _check_quotes(name: str, value: str | None, filename: str, source: str) -> None:
    if value is not None and not word_spans(value)[1]:
        raise EmupmemError(
            f"{filename}:{line_of(name, source)}: the value of {name} has a quote that is never closed",
            "GRUB would swallow an added argument; close or remove the quote first",
        )
