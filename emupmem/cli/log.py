# SPDX-License-Identifier: Apache-2.0
"""--verbose: what is run and written, on standard error, without secrets. Imported only where that is wanted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from emupmem.cli.output import say
from emupmem.report.masking import Masker, secrets
from emupmem.system import log, machine


class _Shown(logging.Handler):
    """Shows each record in one line, masked as `emupmem collect` masks. A line that cannot be is left out."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.masker = Masker()
        self.known: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a change that was made is no error because of its log
            for here in (machine.Machine(), getattr(record, "machine", None)):
                if here is not None:
                    self._learn(here)
            say(self._masked(record.getMessage()).replace("\n", "\\x0a").replace("\t", "\\x09"))

    def _learn(self, here: machine.Machine) -> None:
        """Know the names that a machine and its users go by."""
        if str(here.root) not in self.known:
            self.masker.know(*secrets(here))
            self.known.add(str(here.root))

    def _masked(self, text: str) -> str:
        self.masker.learn(text)
        return self.masker.mask(text)[0]


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show the log while a command runs."""
    logger, handler = logging.getLogger(log.NAME), _Shown()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
