# SPDX-License-Identifier: Apache-2.0
"""What a disk holds at one moment of a change: as it is, and as a power cut at that moment might leave it.

After a kill the files are as the kernel has them. After a power cut only what was synced is sure: a name is
there once its folder was synced, a content once the file was (fsync(2)); and a file system may have kept a
new name and lost the content behind it. `Disk` follows a traced run and gives these three worlds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.crash.tracer import SYNCING, Call
from tests.fake import FakeMachine

BACKUPS = "var/backups/emupmem"


@dataclass(frozen=True)
class Node:
    """A file (`data` its content), a folder, or a link (`data` its target)."""

    kind: str
    mode: int
    data: bytes = b""
    inode: int = 0


World = Mapping[str, Node]
"""The nodes of a tree by their path in it."""


def look(root: Path) -> dict[str, Node]:
    """All that is in a tree now, folders before what they hold."""
    found: dict[str, Node] = {"": Node("folder", 0, b"", root.stat().st_ino)}
    _look_below(str(root), "", found)
    return found


def _look_below(folder: str, start: str, found: dict[str, Node]) -> None:
    # In strings and with few calls: it is asked at every stop of every run.
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name, info = f"{start}{entry.name}", entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                found[name] = Node("link", 0, os.fsencode(os.readlink(entry.path)), info.st_ino)  # noqa: PTH115
            elif stat.S_ISDIR(info.st_mode):
                found[name] = Node("folder", stat.S_IMODE(info.st_mode), b"", info.st_ino)
                _look_below(entry.path, f"{name}/", found)
            else:
                with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123
                    found[name] = Node("file", stat.S_IMODE(info.st_mode), file.read(), info.st_ino)


def build(world: World, root: Path) -> None:
    """Make the tree anew elsewhere."""
    root.mkdir(parents=True, exist_ok=True)
    for name, node in world.items():
        path = root / name
        if node.kind == "link":
            path.symlink_to(os.fsdecode(node.data))
        elif node.kind == "folder":
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(node.data)
            path.chmod(node.mode)


def rebuilt(folder: Path, world: World) -> FakeMachine:
    """A machine with that on its disk, in a new folder below this one."""
    root = folder / f"m{len(list(folder.iterdir()))}"
    build(world, root)
    return FakeMachine(root)


def essence(world: World) -> tuple[tuple[str, str, int, bytes], ...]:
    """What tells two worlds apart: all but inodes, the stamps of backups, and what grub-mkconfig has half made."""

    def one(name: str, node: Node) -> tuple[str, str, int, bytes]:
        data = b"" if name.endswith("/lock") or name.endswith("grub.cfg.new") else node.data
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "STAMP", name), node.kind, node.mode, data

    return tuple(sorted(one(name, node) for name, node in world.items() if name))


def settled(world: World) -> tuple[tuple[str, str, int, bytes], ...]:
    """The essence of what counts in the end: without the backups, folders, and what grub-mkconfig may leave.

    It takes its own half-made file away when it runs the next time.
    """
    own = (n for n in world if not n.startswith("var/") and not n.endswith("/grub.cfg.new"))
    left = {n: world[n] for n in own if world[n].kind != "folder"}
    return essence(left)


def litter(world: World) -> list[str]:
    """Half-made files."""
    return [n for n in world if re.search(r"(^|/)\.[^/]*(emupmem|\.new)[^/]*$", n)]


class Disk:
    """A tree, and what of it is surely on the disk: at first all of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pins: dict[int, int] = {}
        self.content: dict[int, tuple[bytes, int]] = {}
        self.listing: dict[int, dict[str, Node]] = {}
        self.top = root.stat().st_ino
        self._sync_all(self._look())

    def close(self) -> None:
        for descriptor in self.pins.values():
            os.close(descriptor)

    def worlds(self) -> Iterator[tuple[str, World]]:
        """What is left if all ends now."""
        now = self._look()
        yield "killed", now
        yield "lost what was not synced", dict(self._surely("", self.top))
        yield "lost the contents that were not synced", {n: self._emptied(node) for n, node in now.items()}

    def about_to(self, call: Call) -> None:
        """Take notice of a call that makes something sure."""
        if call.name in ("sync", "syncfs"):
            self._sync_all(self._look())
        if call.name in SYNCING and call.inside(self.root):
            now = self._look()
            self._sync(now, str(Path(call.paths[0]).relative_to(self.root)).removeprefix("."))

    def _look(self) -> dict[str, Node]:
        found = look(self.root)
        for name, node in found.items():
            if node.inode not in self.pins:
                # A number is not given to another file while somebody has the first one.
                flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                self.pins[node.inode] = os.open(self.root / name, flags)
        return found

    def _sync_all(self, now: World) -> None:
        for name in now:
            self._sync(now, name)

    def _sync(self, now: World, name: str) -> None:
        node = now[name]
        if node.kind == "file":
            self.content[node.inode] = (node.data, node.mode)
        elif node.kind == "folder":
            start = f"{name}/" if name else ""
            below = {n.removeprefix(start): o for n, o in now.items() if n.startswith(start) and n}
            self.listing[node.inode] = {n: o for n, o in below.items() if "/" not in n}

    def _surely(self, name: str, inode: int) -> Iterator[tuple[str, Node]]:
        for base, node in self.listing.get(inode, {}).items():
            path = f"{name}/{base}" if name else base
            data, mode = self.content.get(node.inode, (b"", node.mode))
            yield path, replace(node, data=data, mode=mode) if node.kind == "file" else node
            if node.kind == "folder":
                yield from self._surely(path, node.inode)

    def _emptied(self, node: Node) -> Node:
        if node.kind != "file" or self.content.get(node.inode, (None, 0))[0] == node.data:
            return node
        return replace(node, data=b"")


def on_the_way(disk: Disk, note: Callable[[Call | None, str, World], None]) -> Callable[[Call], None]:
    """For `trace`: tell `note` the worlds before each changing call in the tree."""

    def on_call(call: Call) -> None:
        if call.inside(disk.root):
            for how, world in disk.worlds():
                note(call, how, world)
        disk.about_to(call)

    return on_call
