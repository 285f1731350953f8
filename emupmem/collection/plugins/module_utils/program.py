# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the modules ask the emupmem of a host: one call, one object of JSON back."""

from __future__ import annotations

import json
import os

OPTIONS = {"program": {"type": "path"}}
"""What every module takes."""

PLAN_OPTIONS = {
    **OPTIONS,
    "size": {"type": "str"},
    "count": {"type": "int", "default": 1},
    "numa_node": {"type": "int"},
    "min_free": {"type": "str", "default": "2G"},
}
"""What those take that plan."""

OK, FAILED, USAGE, NOT_AS_ASKED = 0, 1, 2, 3
"""The exit statuses of emupmem."""

NEWER_NEEDED = (
    "the emupmem of this host is too old for this collection: install the one that the collection came with"
)


class Emupmem:
    """The program on the host, called for one module."""

    def __init__(self, module):
        self.module = module
        given = module.params["program"]
        if given and not os.access(given, os.X_OK):
            module.fail_json(
                msg=f"{given} is not there, or cannot be executed: program names the emupmem of the host"
            )
        self.path = given or module.get_bin_path("emupmem", opt_dirs=["/usr/local/bin", "/opt/emupmem/bin"])
        if self.path is None:
            module.fail_json(
                msg="emupmem is not installed on this host: the role emupmem.emupmem.emupmem installs it, "
                "or give its place as program"
            )

    def ask(self, words, expected=(OK,)):
        """Call it; returns (exit status, the object it printed). Ends the module where the status is not expected."""
        status, out, err = self.module.run_command([self.path, *words, "--json"])
        try:
            result = json.loads(out)
        except ValueError:
            result = None
        if not isinstance(result, dict):
            self.module.fail_json(msg=_without_json(status, err), status=status, stdout=out, stderr=err)
        if status not in expected:
            self.module.fail_json(
                msg=result.get("error") or _last_words(err), status=status, emupmem=result, stderr=err
            )
        return status, result

    def fail(self, message, result):
        """End the module with what emupmem printed beside the message."""
        self.module.fail_json(msg=message, emupmem=result)


def plan_words(options):
    """The words of apply and suggest that say what is to be planned."""
    words = ["--count", str(options["count"]), "--min-free", options["min_free"]]
    words += ["--size", options["size"]] if options["size"] else []
    return words + (["--numa-node", str(options["numa_node"])] if options["numa_node"] is not None else [])


def need(result, member, module):
    """Raise where an older emupmem printed the object: it has not this member."""
    if member not in result:
        module.fail_json(msg=NEWER_NEEDED, emupmem=result)


def _last_words(err):
    """What was said on standard error, as one line."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "emupmem said nothing"


def _without_json(status, err):
    if status == USAGE and "No such" in err:  # an option or a command that it does not know
        return f"{NEWER_NEEDED} ({_last_words(err)})"
    return f"emupmem ended with status {status}: {_last_words(err)}"
