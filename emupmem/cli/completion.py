# SPDX-License-Identifier: Apache-2.0
"""Completion for bash, zsh and fish: `emupmem completion bash`, or `python -m emupmem.cli.completion bash`.

The program is not asked at each Tab, it starts too slowly. The script that is printed has the commands and options in
it, made from the program itself, and looks at the machine with nothing but sh (`shells/words.sh`).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from enum import StrEnum
from importlib import resources
from typing import Annotated, Any

import typer

from emupmem.cli.main import COMMANDS, program_for, shown_commands
from emupmem.cli.output import print_product
from emupmem.model import EmupmemError
from emupmem.record import record


class Shell(StrEnum):
    """The shells that there is a script for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


# What a value may be: a case of `values` in words.sh, or after = the words themselves.
_KINDS = {
    "--size": "free",
    "suggest --size": "reserve",
    "apply --size": "reserve",
    "--offset": "offset",
    "--count": "=1 2 3 4",
    "--min-free": "ram",
    "--numa-node": "node",
    "--node": "node",
    "--from": "file",
    "--svg": "file",
    "--root": "folder",
    "--cache": "folder",
    "--mount": "folder",
    "--keep": "file",
    "--owner": "user",
    "--mode": "=0755 0750 0700 1777",
    "--pmem": "guest",
    "--backend": "file",
    "--align": "=4K 2M 1G",
    "--label": "=128K 1M 2M",
    "--ram": "ram",
    "--qemu": "=qemu-system-x86_64",
    "--region": "region",
    "--name": "=",
    "--wait": "=0 10 60",
    "--socket": "=0 1",
    "--memory-percent": "=0 25 50 75 100",
    "bench TARGET": "memory",
    "remove ITEM": "item",
    "mount DEVICE": "pmem",
    "mount DIR": "folder",
    "umount DIR": "mounted",
    "FILE": "file",
    "DEVICE|DIR": "pmem-or-folder",
    "DEVICE": "pmem",
    "NAME": "namespace",
}
_OPTIONAL = {"--trial": ("--trial", "--trial=kexec")}
"""Options whose value may be left out: the words to offer."""


@record
class _Option:
    """An option as the shells need it; `kind` is empty where it takes no value."""

    names: tuple[str, ...]
    shown: tuple[str, ...]
    kind: str
    help: str
    repeats: bool


@record
class _Known:
    """A command by its full name, as `nvdimm create` (empty: emupmem itself), with what may follow it."""

    name: str
    below: tuple[tuple[str, str], ...]
    options: tuple[_Option, ...]
    places: tuple[str, ...]
    takes_others: bool


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print the completion for a shell: where to put it is in the manual."""
    print_product(completion_script(shell.value).removesuffix("\n"))


def completion_script(shell: str) -> str:
    """The script for a shell. Raises EmupmemError for another one than those of `Shell`."""
    if shell not in list(Shell):
        raise EmupmemError(f"there is no completion for {shell}", "there is one for bash, zsh and fish")
    folder = resources.files("emupmem.cli").joinpath("shells")
    words = folder.joinpath("words.sh").read_text("utf-8").replace("@TABLE@", "\n".join(_table()))
    quoted = _fish_word(words) if shell == Shell.FISH else shlex.quote(words)
    return folder.joinpath(f"completion.{shell}").read_text("utf-8").replace("@WORDS@", quoted)


def _fish_word(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# What the program knows -----------------------------------------------------------------------------------------


def _known() -> Iterator[_Known]:
    group: Any = typer.main.get_command(program_for(()))
    listed = tuple((n, _sentence(p.summary)) for n, p in COMMANDS.items() if not p.hidden)
    yield _Known("", listed, _options("", group), (), False)
    for name, command in shown_commands():
        yield from _below(name, command)


def _below(name: str, command: Any) -> Iterator[_Known]:
    commands = getattr(command, "commands", {})
    below = tuple((n, _sentence(c.help or "")) for n, c in commands.items())
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    places = tuple(_kind(name, p) for p in arguments)
    if arguments and arguments[-1].nargs == -1:
        places += (f"{places[-1]}*",)
    others = bool(command.context_settings.get("allow_extra_args"))
    yield _Known(name, below, _options(name, command), places, others)
    for inner, one in commands.items():
        yield from _below(f"{name} {inner}", one)


def _options(name: str, command: Any) -> tuple[_Option, ...]:
    return tuple(
        _option(name, p)
        for p in command.params
        if p.param_type_name == "option" and not getattr(p, "hidden", False)
    )


def _option(name: str, param: Any) -> _Option:
    names = (*param.opts, *param.secondary_opts)
    long = tuple(n for n in names if n.startswith("--"))
    shown = _OPTIONAL.get(long[0], long)
    flag = param.is_flag or long[0] in _OPTIONAL
    return _Option(names, shown, "" if flag else _kind(name, param), _sentence(param.help), param.multiple)


def _kind(command: str, param: Any) -> str:
    """What a value may be. Raises KeyError where nobody has said it."""
    choices = _choices(param)
    if choices:
        return "=" + " ".join(choices)
    name = next((o for o in param.opts if o.startswith("--")), "")
    name = name or (param.metavar or param.name.upper()).strip("[].")
    return _KINDS.get(f"{command} {name}") or _KINDS[name]


def _choices(param: Any) -> list[str]:
    described = getattr(param, "type_descriptor", None)  # typer 0.29; before it the type itself has them
    found = described.choices if described is not None else getattr(param.type, "choices", None)
    return [str(getattr(c, "value", c)) for c in found or ()]


def _sentence(text: str | None) -> str:
    """The first sentence, without its point."""
    return " ".join((text or "").split()).partition(". ")[0].removesuffix(".")


# The same for sh ------------------------------------------------------------------------------------------------


def _table() -> Iterator[str]:
    known = tuple(_known())
    yield from _function("commands", ((k.name, _lines(k.below)) for k in known if k.below))
    shown = ((k, [(word, o.help) for o in k.options for word in o.shown]) for k in known)
    yield from _function("options", ((k.name, _lines(words)) for k, words in shown if words))
    kinds = ((f"{k.name} {n}", o.kind) for k in known for o in k.options if o.kind for n in o.names)
    yield from _function("kind_of", ((n, f"echo {_quoted(kind)}") for n, kind in kinds), "$1 $2")
    yield from _function("place_of", _places(known), "$1 $2")
    repeated = ((k.name, " ".join(w for o in k.options if o.repeats for w in o.shown)) for k in known)
    yield from _function("repeated", ((n, f'echo "{words}"') for n, words in repeated if words))
    yield from _function("takes_others", ((k.name, "echo yes") for k in known if k.takes_others))


def _places(known: tuple[_Known, ...]) -> Iterator[tuple[str, str]]:
    for one in known:
        for number, kind in enumerate(one.places):
            number_ = f"{one.name} " + ("*" if kind.endswith("*") else str(number))
            yield number_, f"echo {_quoted(kind.removesuffix('*'))}"


def _lines(words: Any) -> str:
    return 'printf "%s$tab%s\\n"' + "".join(f" \\\n\t\t{_quoted(a)} {_quoted(b)}" for a, b in words)


def _quoted(text: str) -> str:
    """A word for sh in the other quotes than those around the script."""
    for sign in '\\"$`':
        text = text.replace(sign, f"\\{sign}")
    return f'"{text}"'


def _function(name: str, cases: Any, on: str = "$1") -> Iterator[str]:
    yield f'{name}() {{\n\tcase "{on}" in'
    for pattern, body in cases:
        first, star = (pattern[:-1], "*") if pattern.endswith("*") else (pattern, "")
        yield f'\t"{first}"{star})\n\t\t{body}\n\t\t;;'
    yield "\tesac\n}\n"


if __name__ == "__main__":
    try:
        print(completion_script(" ".join(sys.argv[1:])), end="")
    except EmupmemError as exc:
        sys.exit(f"emupmem: {exc.message}; {exc.hint}")
