# SPDX-License-Identifier: Apache-2.0
"""Ansible's way into a played machine: the test holds it, and answers on a socket (see `tests.fleet.hosts`)."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: played
short_description: a played machine
description: a played machine
options:
  host:
    description: its name
    default: inventory_hostname
    vars:
      - name: inventory_hostname
"""


class Connection(ConnectionBase):  # type: ignore[misc]
    """The machine with the name of the inventory."""

    transport = "played"
    has_pipelining = True

    def _connect(self) -> Connection:
        return self

    def close(self) -> None:
        self._connected = False

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> Any:
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        return self._ask("run", cmd, in_data or b"")

    def put_file(self, in_path: str, out_path: str) -> None:
        self._ask("write", out_path, Path(in_path).read_bytes())

    def fetch_file(self, in_path: str, out_path: str) -> None:
        Path(out_path).write_bytes(self._ask("read", in_path))

    def _ask(self, service: str, name: str, data: bytes = b"") -> Any:
        with socket.socket(socket.AF_UNIX) as there:
            there.connect(os.environ["EMUPMEM_PLAYED"])
            there.sendall(
                json.dumps([self.get_option("host"), service, name, data.decode("latin-1")]).encode()
            )
            there.shutdown(socket.SHUT_WR)
            answer = pickle.loads(b"".join(iter(lambda: there.recv(1 << 16), b"")))
        if isinstance(answer, Exception):
            raise AnsibleConnectionFailure(str(answer))
        return answer
