# SPDX-License-Identifier: Apache-2.0
"""Played machines as hosts of Ansible."""

from __future__ import annotations

import json
import pickle
import socketserver
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.fleet import build
from tests.fleet.control import Control
from tests.scenario.machine import Scenario

SETTINGS = "[pmem:vars]\nansible_connection=played\nansible_python_interpreter=/usr/bin/python3\n"


class Fleet(Control):
    """`with Fleet(hosts, folder) as fleet`: each host is a scenario, which the test holds."""

    def __init__(self, hosts: Mapping[str, Scenario], folder: Path, version: str = build.NEWEST) -> None:
        super().__init__(folder, "".join(f"{name}\n" for name in hosts) + SETTINGS, version)
        self.hosts = hosts
        self._locks = {name: threading.Lock() for name in hosts}
        self.unreachable: set[str] = set()

    def __enter__(self) -> Self:
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
