# SPDX-License-Identifier: Apache-2.0
"""Users and groups of a machine."""

from __future__ import annotations

from emupmem.model import EmupmemError
from emupmem.system.host import Host


def find_account(machine: Host, owner: str) -> tuple[int, int]:
    """(user id, group id) of `USER`, `USER:GROUP` or numbers; the user's own group if none is named.

    Raises EmupmemError for a name that the machine does not know.
    """
    user, colon, group = owner.partition(":")
    users = {f[0]: (int(f[2]), int(f[3])) for f in _account_lines(machine, "/etc/passwd", 7, user)}
    groups = {f[0]: int(f[2]) for f in _account_lines(machine, "/etc/group", 4, group)}
    if not user or (colon and not group):
        raise EmupmemError(f"{owner!r} is not USER or USER:GROUP")
    if user not in users and not user.isdecimal():
        raise EmupmemError(f"there is no user {user}", "getent passwd lists them")
    if group and group not in groups and not group.isdecimal():
        raise EmupmemError(f"there is no group {group}", "getent group lists them")
    uid, gid = users[user] if user in users else (int(user), int(user))
    return uid, (groups[group] if group in groups else int(group)) if group else gid


def _account_lines(machine: Host, file: str, fields: int, name: str) -> list[list[str]]:
    """Lines of a user or group file; on the running machine what other sources (LDAP) know of `name` too."""
    text = machine.peek(file)
    if machine.live and name:
        done = machine.output("getent", file.rpartition("/")[2], "--", name)
        text += "\n" + (done.stdout.decode("utf-8", "replace") if done and not done.status else "")
    lines = [line.split(":") for line in text.splitlines()]
    return [f for f in lines if len(f) >= fields and f[2].isdecimal() and (fields < 7 or f[3].isdecimal())]
