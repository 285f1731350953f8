# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: `emupmem` imported once, and each call of it a process of its own, forked from that.

Without KVM the imports of one call take three seconds, its work mostly less than one. A script that
begins with `. /job/warm` calls emupmem by a function of the shell, which leaves its words here. The
forked process takes over the caller's folder, standard input, output and error themselves, and its
status is the caller's; `emupmem_as USER` is the same as that user. What is called otherwise (by systemd,
runuser, timeout) is the real program.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pwd
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

FOLDER = Path("/run/emupmem-warm")

# What a script sources as /job/warm. The pipe is made last: the words are complete then, and the
# shell's output is its own again.
SHELL = r"""
mkdir -p /run/emupmem-warm
if [ -e /usr/lib/python3/dist-packages/emupmem ]; then  # the package, with what was compiled when it was installed
    (/usr/bin/python3 /job/warm.py </dev/null >/run/warm.log 2>&1 &)
else
    (PYTHONPYCACHEPREFIX=/var/cache/emupmem-pyc /opt/emupmem/bin/python /job/warm.py </dev/null >/run/warm.log 2>&1 &)
fi
emupmem() { emupmem_as root "$@"; }
emupmem_as() {
    local status call=/run/emupmem-warm/$BASHPID.${EPOCHREALTIME/./}
    printf '%s\0' "$BASHPID" "$PWD" "$@" >"$call.words"
    mkfifo "$call.status"
    read -r -t 3000 status <>"$call.status" || { cat /run/warm.log >&2; return 99; }
    return "$status"
}
"""

# include/uapi/asm-generic/unistd.h
PIDFD_OPEN, PIDFD_GETFD = 434, 438


# The commands that most scripts call. What else is called is imported by the call.
USUAL = ("cli.main", "cli.suggest", "cli.apply", "cli.verify", "cli.mount", "cli.trial", "cli.doctor")
LOG = """[    0.000000] BIOS-provided physical RAM map:
[    0.000000] BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable
[    0.000000] NX (Execute Disable) protection: active
"""


def serve() -> None:
    """Wait for calls for ever."""
    from emupmem.cli.typer_alone import import_typer

    import_typer()
    from emupmem.editor.lens import layout_of
    from emupmem.parser.bootlog import parse_boot_log

    for name in USUAL:
        importlib.import_module(f"emupmem.{name}")
    # What is made at the first use: the patterns of a log, and augeas with its lens.
    parse_boot_log(LOG)
    layout_of("A=b\n")
    gc.freeze()  # what lies there already is left alone: a page that is not touched is not copied either
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    seen: set[Path] = set()
    while True:
        for pipe in set(FOLDER.glob("*.status")) - seen:
            seen.add(pipe)
            if os.fork() == 0:
                answer(pipe)
                os._exit(0)
        time.sleep(0.02)


def answer(pipe: Path) -> None:
    """Run one call in a process of its own with the caller's streams; its status goes into the pipe."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid, folder, user, *words = (
        os.fsdecode(w) for w in pipe.with_suffix(".words").read_bytes().split(b"\0")[:-1]
    )
    libc = ctypes.CDLL(None, use_errno=True)
    caller = libc.syscall(PIDFD_OPEN, int(pid), 0)
    for number in (1, 2):
        os.dup2(libc.syscall(PIDFD_GETFD, caller, number, 0), number)
    # Those of the server were made for a file: they would seek in what is a pipe now.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    worker = os.fork()
    if worker == 0:
        os.chdir(folder)  # before: the folder of another user may be closed
        become(user)
        run(words)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    with pipe.open("w") as stream:
        stream.write(f"{status if status >= 0 else 128 - status}\n")
    pipe.unlink()


def become(name: str) -> None:
    """Be this user from now on, as runuser makes it."""
    if name == "root":
        return
    user = pwd.getpwnam(name)
    os.initgroups(name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ |= {"HOME": user.pw_dir, "USER": name, "LOGNAME": name}


def run(words: list[str]) -> NoReturn:
    """The program itself."""
    from emupmem.cli.main import main

    os.closerange(3, 20)
    sys.argv = ["emupmem", *words]
    status: object = 1
    try:
        main()
    except SystemExit as exc:
        status = exc.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve()
