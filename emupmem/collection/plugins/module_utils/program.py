# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the modules ask the emupmem of a host: one call, one object of JSON back."""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback

OPTIONS = {"program": {"type": "path"}}
"""What every module takes."""

PLAN_OPTIONS = {
    **OPTIONS,
    "size": {"type": "str"},
    "count": {"type": "int", "default": 1},
    "numa_node": {"type": "int"},
    "far": {"type": "bool", "default": False},
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
        argv = [self.path, *words, "--json"]
        status, out, err = _forked(argv) if _is_ours(self.path) else self.module.run_command(argv)
        try:
            result = json.loads(out)
        except ValueError:
            result = None
        if not isinstance(result, dict):
            self.module.fail_json(msg=_without_json(status, err), status=status, stdout=out, stderr=err)
        if status not in expected:
            self.fail(result.get("error") or _last_words(err), result, status=status, stderr=err)
        return status, result

    def fail(self, message, result, **more):
        """End the module with what emupmem printed beside the message."""
        self.module.fail_json(msg=message, changed=result.get("changed") is True, emupmem=result, **more)


def _is_ours(path):
    """Whether the program is a script of the very Python that runs this module, which need not start once more."""
    if not hasattr(os, "waitstatus_to_exitcode"):  # older than any Python that emupmem runs with
        return False
    try:
        with open(path, "rb") as file:
            words = os.fsdecode(file.readline(256)).split()
    except OSError:
        return False
    line = "".join(words)  # "#! /usr/bin/python3" is as good as "#!/usr/bin/python3"; options are not
    return line.startswith("#!/") and len(words) < 3 and _place(line[2:]) == _place(sys.executable)


def _place(python):
    """By what two names of one Python are known: it finds its libraries by the folder that it was called in."""
    return os.path.dirname(python), os.path.realpath(python)


def _forked(argv):
    """What `run_command` does, by a copy of this process that becomes the program: half of its time is the start."""
    files = [os.memfd_create(name) for name in ("stdout", "stderr")]
    gc.disable()  # what it would look through, and so copy, is all of Ansible; the program ends in a moment
    pid = os.fork()
    if pid == 0:
        _become(argv, files)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for number in files:
        with open(number, "rb") as file:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    return (status, *texts)


def _become(argv, files):
    """Run the program's script as Python does, with standard streams of its own, and end."""
    status = 1
    try:
        for number, source in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
            os.dup2(source, number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, "w" if number else "r", closefd=False) for number in range(3)
        )
        sys.argv = argv
        sys.path = [
            place for place in sys.path if not os.path.isfile(place)
        ]  # not Ansible's archive of the module
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def plan_words(options):
    """The words of apply and suggest that say what is to be planned."""
    words = ["--count", str(options["count"]), "--min-free", options["min_free"]]
    words += ["--size", options["size"]] if options["size"] else []
    words += ["--numa-node", str(options["numa_node"])] if options["numa_node"] is not None else []
    return words + (["--far"] if options["far"] else [])


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
