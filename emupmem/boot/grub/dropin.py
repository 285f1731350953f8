# SPDX-License-Identifier: Apache-2.0
"""The text of emupmem's own file in /etc/default/grub.d, for machines where another one has the last word. Pure.

Cloud images assign GRUB_CMDLINE_LINUX_DEFAULT anew in a drop-in, so what /etc/default/grub says of it never
reaches the kernel. A drop-in that is read after it and extends the variable does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NAME = "/etc/default/grub.d/zz-emupmem.cfg"
MARK = "# Written by emupmem"
_LINE = re.compile(r'^(GRUB_CMDLINE_LINUX(?:_DEFAULT)?)="\$\1 ([A-Za-z0-9_.,:=/!%+ -]+)"$', re.MULTILINE)


def dropin_text(variable: str, words: Sequence[str], winner: str) -> str:
    """The file that adds words to a variable; `winner` is the file and line that assigns it anew."""
    shown = re.sub(r"[^ -~]", "?", winner)  # a name of a file may hold a line break, and this is a comment
    return (
        f"{MARK}: {shown} overrides {variable}, so the reservation\n"
        "# cannot go into /etc/default/grub. `emupmem remove` deletes this file.\n"
        f'{variable}="${variable} {" ".join(words)}"\n'
    )


def read_dropin(data: str) -> tuple[str, tuple[str, ...]] | None:
    """(variable, words) of a file that `text` made, None for any other text."""
    found = _LINE.search(data)
    if not data.startswith(MARK) or found is None:
        return None
    return found[1], tuple(found[2].split())
