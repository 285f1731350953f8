# SPDX-License-Identifier: Apache-2.0
"""The command line: call a stage, show its result, choose the exit status. No logic of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from emupmem import __version__
from emupmem.cli import stdio, wording
from emupmem.cli.given import check_only_given
from emupmem.cli.options import EPILOG
from emupmem.cli.output import Exit, UsageError, say, usage
from emupmem.cli.terminal import width_of
from emupmem.cli.typed import command_of
from emupmem.model import EmupmemError
from emupmem.record import record

HELP = (
    "Turn ordinary RAM into /dev/pmem0 for development: plan memmap=, give it to the boot loader, "
    "prove it after the reboot. The device is emulated and volatile: its content does not survive a power cycle."
)


ANYWHERE = ("-q", "--quiet", "-v", "--verbose", "--debug")
"""Options of the program itself that may also follow the command."""

_LONGEST_WORD = 1024


def _version(wanted: bool) -> None:
    if wanted:
        print(f"emupmem {__version__}")
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show each program that is run and each file that is written."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only warnings and errors (and what --json prints).")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Like --verbose, with a traceback for an error.")
    ] = False,
) -> None:
    if quiet and (verbose or debug):
        usage("--quiet and --verbose exclude each other")
    if quiet:
        stdio.be_quiet()
    if debug:
        os.environ["EMUPMEM_DEBUG"] = "1"
    if verbose or debug:
        from emupmem.cli import log  # 16 ms, only here

        context.with_resource(log.shown())


@record
class Place:
    """Where a command is: `function` of the module `module` here (empty: the module's group, `app`)."""

    module: str
    function: str
    summary: str = ""
    hidden: bool = False

    def add_to(self, program: typer.Typer, name: str) -> None:
        """Import the module and give the program this command."""
        module = import_module(f"emupmem.cli.{self.module}")
        if not self.function:
            program.add_typer(module.app, name=name)
            return
        settings = {"ignore_unknown_options": True} if self.hidden else {}
        more: dict[str, Any] = {"hidden": True} if self.hidden else {"epilog": EPILOG}
        program.command(name, context_settings=settings, **more)(getattr(module, self.function))

    def list_in(self, program: typer.Typer, name: str) -> None:
        """Give the program the name and the summary only: nothing is imported, nothing can be called."""
        if self.function:
            program.command(name, help=self.summary, hidden=self.hidden)(_unreached)
        else:
            program.add_typer(typer.Typer(help=self.summary), name=name)


def _unreached() -> NoReturn:
    raise AssertionError("only listed")


# In the order of --help. Only the module of the command that was typed is imported: all of them take longer to
# import than most commands to run. The summary is the first sentence of what it says of itself.
COMMANDS = {
    "suggest": Place("suggest", "suggest", "Show the usable memory and plan a reservation."),
    "apply": Place("apply", "apply", "Put the reservation into the boot configuration, safely."),
    "remove": Place("apply", "remove", "Give reserved memory back: undo what apply did."),
    "verify": Place("verify", "verify", "Check every step, from the boot configuration to DAX."),
    "mount": Place(
        "mount",
        "mount",
        "Make a DAX file system on the device if it is blank, mount it, and prove that it is DAX.",
    ),
    "umount": Place("mount", "umount", "Unmount persistent memory; if it is in use, name the program."),
    "save": Place("snapshot", "save", "Save the content of a device: a sparse raw image with a checksum."),
    "restore": Place("snapshot", "restore", "Put a saved image back onto a device."),
    "boot-mount": Place("at_boot", "boot_mount", hidden=True),
    "boot-save": Place("at_boot", "boot_save", hidden=True),
    "boot-left": Place("at_boot", "boot_left", hidden=True),
    "confirm": Place(
        "trial",
        "confirm",
        "Make the running trial's reservation permanent, if every check passes.",
    ),
    "abandon": Place("trial", "abandon", "Cancel a trial: delete its boot entry, change nothing else."),
    "doctor": Place(
        "doctor", "doctor", "Show everything that decides whether this will work, before and after."
    ),
    "collect": Place(
        "doctor",
        "collect",
        "Write one archive for suggest --from and doctor --from on another machine, secrets masked.",
    ),
    "bench": Place(
        "bench",
        "bench",
        "Measure how many ns a load takes: local memory beside nodes, DAX devices and files on a DAX mount.",
    ),
    "namespaces": Place(
        "namespaces",
        "",
        "Divide a reserved range into namespaces of any size (the ramdax driver, Linux 6.19 and later).",
    ),
    "qemu": Place("qemu", "", "Give a virtual machine a persistent-memory device (a vNVDIMM)."),
    "nvdimm": Place(
        "nvdimm",
        "",
        "Regions and namespaces of NVDIMMs, real or virtual, with ndctl; the goal of Intel Optane modules with ipmctl.",
    ),
    "demo": Place(
        "demo",
        "demo",
        "Show the whole job in a throw-away virtual machine: suggest, apply, reboot, verify, mount, remove.",
    ),
    "completion": Place(
        "completion", "completion", "Print the completion for a shell: where to put it is in the manual."
    ),
    "help": Place(
        "manual",
        "manual_help",
        "Show the manual: all commands with their options, files, exit status, JSON, how to recover.",
    ),
}


def main() -> NoReturn:
    """Run the program: one line for an error and one for what to do, a traceback only with --debug."""
    closed = tuple(name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None)
    if closed:
        from emupmem.system.streams import standard_streams  # 13 ms, hardly ever

        standard_streams()
    # An option with a value that may be left out: typer has none.
    own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    typed = ["--trial=grub" if w == "--trial" else w for w in sys.argv[1:own]]
    sys.argv[1:own] = [w for w in typed if w in ANYWHERE] + [w for w in typed if w not in ANYWHERE]
    with stdio.guarded(closed):
        status = _status()
    sys.exit(status)


def _status() -> int:
    """Run the command; its exit status, every error said."""
    try:
        words = sys.argv[1:]
        empty = wording.empty_word(words)
        if empty:
            usage(f"{empty} is empty: is a variable not set?")
        command = command_of(program_for(words))
        check_only_given(command)
        status: int = command(standalone_mode=False, prog_name="emupmem") or Exit.OK
        sys.stdout.flush()
        if status == 128 + signal.SIGINT:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
    except EmupmemError as exc:
        wrong_use = isinstance(exc, UsageError)
        hint = exc.hint or (wording.help_hint(sys.argv[1:], tuple(COMMANDS)) if wrong_use else "")
        status = _fail(exc.message, hint, Exit.USAGE if wrong_use else Exit.ERROR, exc)
    except BrokenPipeError:
        # The reader of a pipe has gone: nothing more to tell, and nobody to tell it to.
        status = Exit.ERROR
    except KeyboardInterrupt:
        # While something is changed, signals are held back: this comes before or after it.
        status = _fail("stopped", "emupmem verify shows what is in force", Exit.ERROR, None)
    except Exception as exc:
        if exc is stdio.failure():
            why = stdio.failure()
            told = f"standard output cannot be written: {why.strerror if why else ''}"
            return _fail(told, "send it to another place, or look at it on the terminal", Exit.ERROR, exc)
        if isinstance(exc, OSError):
            return _fail(*_system_error(exc), Exit.ERROR, exc)
        # typer's own errors, without importing the click that it brings or does not bring
        if type(exc).__name__ == "NoArgsIsHelpError":  # its message is the help: as it is, not in one line
            say(exc.format_message())  # type: ignore[attr-defined]
            status = Exit.USAGE
        elif not hasattr(exc, "format_message"):
            if os.environ.get("EMUPMEM_DEBUG"):
                raise
            name = type(exc).__name__
            status = _fail(
                f"unexpected: {name}: {exc}", "emupmem --debug shows where; please report it", Exit.ERROR, exc
            )
        else:
            message = wording.in_own_words(exc.format_message(), sys.argv[1:])
            hint = wording.help_hint(sys.argv[1:], tuple(COMMANDS), message)
            status = _fail(message, hint, getattr(exc, "exit_code", Exit.USAGE), None)
    return int(status)


def program_for(words: Sequence[str]) -> typer.Typer:
    """The program with the one command that was typed; else all of them listed, for --help or a wrong name."""
    typed = next((w for w in words if not w.startswith("-")), "")
    wide = width_of(sys.stdout)
    # By itself click makes no --help narrower than 50 columns. Options would get a column that cuts words.
    narrow = {"terminal_width": wide - 2} if wide < 52 and not typed else {}
    made = typer.Typer(
        name="emupmem",
        help=HELP,
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, **narrow},
    )
    made.callback()(_options)
    if typed in COMMANDS:
        COMMANDS[typed].add_to(made, typed)
        return made
    for name, command in COMMANDS.items():
        command.list_in(made, name)
    return made


def shown_commands() -> Iterator[tuple[str, Any]]:
    """Each command that --help lists, by name, or the group of that name, as typer makes them."""
    for name, place in COMMANDS.items():
        if not place.hidden:
            group = command_of(program_for([name]))
            # A program of one command is that command.
            yield name, group.commands[name] if hasattr(group, "commands") else group


def _system_error(exc: OSError) -> tuple[str, str]:
    """An error of the system that nobody foresaw, as message and hint."""
    from emupmem.system.errors import sudo_hint  # hardly ever

    why = exc.strerror or str(exc)
    if exc.filename is not None:
        return f"{os.fsdecode(exc.filename)}: {why}", sudo_hint(exc)
    if isinstance(exc, FileNotFoundError):
        return "the folder that you are in is gone", "cd to another one"
    return f"the system says: {why}", sudo_hint(exc)


def _shortened(word: str) -> str:
    """A word for a message: longer ones than a path can have are rubbish that was typed."""
    return word if len(word) <= _LONGEST_WORD else f"{word[:40]}…{word[-20:]}"


def _fail(message: str, hint: str, status: int, exc: BaseException | None) -> int:
    if exc is not None and os.environ.get("EMUPMEM_DEBUG"):
        import traceback  # 3 ms, --debug only

        traceback.print_exception(exc)
    say(f"emupmem: {' '.join(map(_shortened, message.split()))}")
    if hint:
        say(f"         {' '.join(hint.split())}")
    return status
