# SPDX-License-Identifier: Apache-2.0
"""typer without rich: up to 0.19 it imports rich whether it is used or not, which takes as long as all the rest."""

from __future__ import annotations

import sys


def import_typer() -> None:
    """Import typer, if that was not done yet; nothing here is shown by it with rich (`rich_markup_mode` is None).

    rich itself can be imported afterwards as always. A typer that does not work without it gets it.
    """
    if "typer" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import typer  # as where rich is not installed
    except ImportError:
        pass
    finally:
        del sys.modules["rich"]
    import typer  # noqa: F401
