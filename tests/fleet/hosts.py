# SPDX-License-Identifier: Apache-2.0
"""Played machines as hosts of Ansible."""

from __future__ import annotations

import json
import os
import pickle
import socketserver
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.fleet import build
from tests.scenario.machine import Scenario


class Told(NamedTuple):
    """How a play ended: exit status, and each task's result by (task, host)."""

    status: int
    results: dict[tuple[str, str], dict[str, Any]]
    text: str

    def of(self, task: str) -> dict[str, dict[str, Any]]:
        """The results of one task by host."""
        return {host: result for (name, host), result in self.results.items() if name == task}


class Fleet:
    """`with Fleet(hosts, folder) as fleet`: a collection that is installed, an inventory, and `play`."""

    def __init__(self, hosts: Mapping[str, Scenario], folder: Path, version: str = build.NEWEST) -> None:
        self.hosts, self.folder, self.version = hosts, folder, version
        self._locks = {name: threading.Lock() for name in hosts}
        self.unreachable: set[str] = set()

    def __enter__(self) -> Self:
        build.install(build.build(self.folder), self.folder / "collections", self.version)
        names = "\n".join(self.hosts)
        settings = "ansible_connection=played ansible_python_interpreter=/usr/bin/python3"
        (self.folder / "hosts").write_text(
            f"[pmem]\n{names}\n[pmem:vars]\n" + settings.replace(" ", "\n") + "\n"
        )
        fleet = self

        class Answer(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                host, service, name, data = json.loads(self.rfile.read())
                self.wfile.write(pickle.dumps(fleet._answer(host, service, name, data.encode("latin-1"))))

        self._server = socketserver.ThreadingUnixStreamServer(str(self.folder / "socket"), Answer)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def play(self, tasks: list[dict[str, Any]], *options: str, **play: Any) -> Told:
        """Run a play of these tasks, or of the keywords of `play`, on all hosts."""
        given = {"hosts": "pmem", "gather_facts": False, "tasks": tasks, **play}
        (self.folder / "play.yml").write_text(json.dumps([given]))
        return self.run(str(self.folder / "play.yml"), *options)

    def run(self, *words: str) -> Told:
        """Run ansible-playbook with these words, and read what its JSON callback says."""
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
            "ANSIBLE_CONNECTION_PLUGINS": str(Path(__file__).with_name("connection")),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).with_name("callback")),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
            "ANSIBLE_HOME": str(self.folder / "home"),
            "EMUPMEM_PLAYED": str(self.folder / "socket"),
            "EMUPMEM_TOLD": str(self.folder / "told"),
        }
        environment["ANSIBLE_STDOUT_CALLBACK"] = "told"
        (self.folder / "told").write_text("")
        argv = [
            str(build.ansible(self.version) / "ansible-playbook"),
            "-i",
            str(self.folder / "hosts"),
            *words,
        ]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in (self.folder / "told").read_text().splitlines()]
        return Told(done.returncode, {(t, h): r for t, h, r in lines}, done.stdout + done.stderr)

    def _answer(self, host: str, service: str, name: str, data: bytes = b"") -> Any:
        if host in self.unreachable:
            return ConnectionError("no route to host")
        machine = self.hosts[host]
        with self._locks[host]:
            try:
                if service == "write":
                    return machine.write(name, data)
                if service == "read":
                    return machine.read(name).encode("utf-8", "surrogateescape")
                # Bytes would be taken for text by Scenario.run: what Ansible gives is text.
                done = machine.run("/bin/sh", "-c", name, given=data.decode("utf-8", "surrogateescape"))
                return done.status, done.stdout.encode(), done.stderr.encode()
            except (OSError, TimeoutError) as exc:
                return ConnectionError(str(exc))
