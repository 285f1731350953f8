# SPDX-License-Identifier: Apache-2.0
"""`python -m emupmem` is the same as `emupmem`."""

import signal
from typing import NoReturn


def start() -> NoReturn:
    """The program: `main` is imported here, so that Ctrl-C in that fifth of a second ends it without a traceback."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have it ignored
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from emupmem.cli.typer_alone import import_typer

    import_typer()
    from emupmem.cli.main import main

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


if __name__ == "__main__":
    start()
