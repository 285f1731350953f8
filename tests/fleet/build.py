# SPDX-License-Identifier: Apache-2.0
"""Build the Ansible collection: `python -m tests.fleet.build FOLDER`. Ansible comes from PyPI, into the cache."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from emupmem import __version__
from tests import PROJECT
from tests.vm import image

SOURCE = PROJECT / "emupmem" / "collection"
NEWEST, OLDEST = "2.19.14", "2.16.19"
"""Of ansible-core: what the newest of Debian 13 is, and what is still about."""


def ansible(version: str = NEWEST) -> Path:
    """The folder of the programs of this ansible-core. Raises RuntimeError where it cannot be installed."""
    name = f"{version}-{sys.version_info.major}.{sys.version_info.minor}"
    place = image.cache() / "ansible" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "installed").exists():
            shutil.rmtree(place, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(place)])
            _run([str(place / "bin/pip"), "install", "--quiet", f"ansible-core=={version}"])
            (place / "installed").touch()
    return place / "bin"


def build(target: Path) -> Path:
    """Build the collection as a file in this folder, with the version of the program."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
        settings = source / "galaxy.yml"
        settings.write_text(re.sub(r"(?m)^version: .*$", f"version: {__version__}", settings.read_text()))
        command = [str(ansible() / "ansible-galaxy"), "collection", "build", "--force"]
        _run([*command, "--output-path", str(target), str(source)])
    return target / f"emupmem-emupmem-{__version__}.tar.gz"


def install(archive: Path, target: Path, version: str = NEWEST) -> None:
    """Install it into a folder of collections, as people do."""
    command = [str(ansible(version) / "ansible-galaxy"), "collection", "install", "--offline"]
    _run([*command, "-p", str(target), str(archive)])


def sanity(collections: Path, tests: Sequence[str]) -> str:
    """What `ansible-test sanity` finds in the collection that is installed there; empty where it finds nothing.

    It makes virtual environments in the home folder, which is one in the cache, and takes pip from a server of
    its own: that of Python serves.
    """
    programs, home = ansible(), image.cache() / "ansible/home"
    internal = next(programs.parent.glob("lib/python3*/site-packages/ansible_test/_internal"))
    (wanted,) = re.findall(r"\bpip='([\d.]+)'", (internal / "python_requirements.py").read_text())
    pip = home / f".ansible/test/cache/get_pip_{wanted.replace('.', '_')}.py"
    pip.parent.mkdir(parents=True, exist_ok=True)
    pip.write_text("import ensurepip\nensurepip.bootstrap()\n")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    argv = [str(programs / "ansible-test"), "sanity", "--python", python, "--color", "no"]
    argv += [word for test in tests for word in ("--test", test)]
    path = f"{programs}:{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "HOME": str(home), "PATH": path, "LC_ALL": "C.UTF-8"}
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = collections / "ansible_collections/emupmem/emupmem"
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    found = re.findall(r"^(?:ERROR|FATAL): .*", done.stdout + done.stderr, re.MULTILINE)
    return "\n".join(found) or ("" if done.returncode == 0 else done.stdout + done.stderr)


def _run(argv: list[str]) -> None:
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:4])}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ".").absolute()))
