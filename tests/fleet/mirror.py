# SPDX-License-Identifier: Apache-2.0
"""What a machine would be given by Debian's mirror and by PyPI: packages for machines that have no network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.vm import image
from tests.vm.machine import run

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def download(suite: str, status: Path, packages: Sequence[str], work: Path) -> list[Path]:
    """Download packages, with what a machine with this /var/lib/dpkg/status lacks of what they depend on, into `work`.

    What was downloaded for an image is taken from the cache. Raises RuntimeError with apt's words.
    """
    archives = work / "archives"
    (work / "lists/partial").mkdir(parents=True)
    (archives / "partial").mkdir(parents=True)
    for archive in (image.cache() / "archives" / suite).glob("*.deb"):
        (archives / archive.name).symlink_to(archive)
    (work / "sources").write_text(f"deb [arch=amd64 signed-by={KEYRING}] {image.mirror()} {suite} main\n")
    options = {
        "Dir::Etc::SourceList": work / "sources",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::State::Status": status,
        "Dir::Cache": work,
        "Dir::Cache::Archives": archives,
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",
        "Debug::NoLocking": "true",
        "APT::Update::Error-Mode": "any",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run([*apt, "update"])
    install = [*apt, "install", "-y", "--no-install-recommends"]
    run([*install, "--download-only", *packages])
    planned = subprocess.run([*install, "--simulate", *packages], capture_output=True, text=True, check=True)
    wanted = {line.split()[1] for line in planned.stdout.splitlines() if line.startswith("Inst ")}
    return sorted(a for a in archives.glob("*.deb") if a.name.split("_")[0] in wanted)


def repository(tree: Path, suite: str, packages: Sequence[str], sources: Sequence[str]) -> Path:
    """A folder that apt and pip of a played machine install from: Debian's packages, and what emupmem depends on.

    Of `sources` the source archives are there, and no wheel. From the cache, else from the mirror and from PyPI.
    Raises RuntimeError with the words of the tool that failed.
    """
    status = tree / "var/lib/dpkg/status"
    needs = image.dependencies()
    key = hashlib.sha256(repr((status.read_bytes(), packages, sources, needs)).encode()).hexdigest()[:12]
    place = image.cache() / "repository" / f"{suite}-{key}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with image._lock(place.parent / "lock"), tempfile.TemporaryDirectory() as name:
        if not place.is_dir():
            unfinished = place.with_suffix(".new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for archive in download(suite, status, packages, Path(name)):
                shutil.copy(archive, unfinished)
            (unfinished / "Packages").write_text("".join(_index(a) for a in sorted(unfinished.glob("*.deb"))))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(unfinished)]
            pip += ["--python-version", "3.11", "--only-binary", ":all:"]
            without = [need for need in needs if not need.startswith(tuple(sources))]
            run([*pip, *without, "cffi", "setuptools", "wheel", "pip"])
            plain = [word for word in pip if word not in ("--python-version", "3.11")]
            run([*plain, "--no-deps", "--no-binary", ",".join(sources), *sources])
            unfinished.rename(place)
    return place


def lacking() -> str:
    """What keeps packages from being had here, in one line; empty where nothing does."""
    missing = [n for n in ("apt-get", "dpkg-deb") if shutil.which(n) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def _index(archive: Path) -> str:
    """What an index of packages says of this one."""
    told = subprocess.run(["dpkg-deb", "-f", str(archive)], capture_output=True, text=True, check=True).stdout
    data = archive.read_bytes()
    return (
        f"{told}Filename: ./{archive.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    )
