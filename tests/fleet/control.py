# SPDX-License-Identifier: Apache-2.0
"""The side where people run Ansible: a collection that is installed, an inventory, plays and what they tell."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fleet import build


class Told(NamedTuple):
    """How a play ended: exit status, each task's last result by (task, host), and the text."""

    status: int
    results: dict[tuple[str, str], dict[str, Any]]
    text: str

    def of(self, task: str) -> dict[str, dict[str, Any]]:
        """The results of one task by host."""
        return {host: result for (name, host), result in self.results.items() if name == task}


class Control:
    """A folder with the collection, and an inventory of one group `pmem`."""

    def __init__(self, folder: Path, inventory: str, version: str = build.NEWEST) -> None:
        self.folder, self.version = folder, version
        folder.mkdir(parents=True, exist_ok=True)
        build.install(build.build(folder), folder / "collections", version)
        (folder / "hosts").write_text(f"[pmem]\n{inventory}")
        (folder / "ansible.cfg").write_text("[defaults]\n")

    def play(self, tasks: Sequence[dict[str, Any]], *options: str, **play: Any) -> Told:
        """Run a play of these tasks, or of the keywords of `play`, on all hosts."""
        given = {"hosts": "pmem", "gather_facts": False, "tasks": list(tasks), **play}
        file = self.folder / "play.yml"
        file.write_text(json.dumps([given]))
        return self.run(str(file), *options)

    def run(self, *words: str) -> Told:
        """Run ansible-playbook with these words, and read what its callback says."""
        told = self.folder / "told"
        told.write_text("")
        done = self.ansible("ansible-playbook", "-i", str(self.folder / "hosts"), *words)
        lines = [json.loads(line) for line in told.read_text().splitlines()]
        return Told(done.returncode, {(t, h): r for t, h, r in lines}, done.stdout + done.stderr)

    def ansible(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program of Ansible, which does not wait for hosts when this process is gone."""
        argv = ["setpriv", "--pdeathsig", "TERM", str(build.ansible(self.version) / program), *words]
        return subprocess.run(argv, env=self.environment(), capture_output=True, text=True, check=False)

    def environment(self) -> dict[str, str]:
        """What Ansible is told: nothing from a person's own settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        return kept | {
            "ANSIBLE_CONFIG": str(self.folder / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
            "ANSIBLE_STDOUT_CALLBACK": "told",
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).with_name("callback")),
            "ANSIBLE_CONNECTION_PLUGINS": str(Path(__file__).with_name("connection")),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_TIMEOUT": "120",
            "ANSIBLE_SSH_ARGS": "-oControlMaster=auto -oControlPersist=600",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
            "ANSIBLE_HOME": str(self.folder / "home"),
            "EMUPMEM_PLAYED": str(self.folder / "socket"),
            "EMUPMEM_TOLD": str(self.folder / "told"),
        }
