# SPDX-License-Identifier: Apache-2.0
"""The Debian package of this tree, built once: `python -m tests.vm.package` prints where it is.

It lies in the cache by the hash of all that it is made of. The build runs those tests that the versions of the
libraries decide about; `make deb` runs all that a build can run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import PROJECT
from tests.vm import image
from tests.vm.machine import Content, Image, run, run_python

TESTS = "tests/cli tests/test_shape.py tests/test_structure.py"
SOURCES = ("emupmem", ".packaging", "pyproject.toml", "README.md", "tests/cli", "tests/fake.py")
KEPT_SECONDS = 7 * 24 * 3600
NEWER = "+newer"


def lacking() -> str:
    """What keeps the package from being built here, in one line; empty where nothing does."""
    if os.geteuid() != 0:
        return "building the package needs root: a tree with files of many owners"
    missing = [n for n in ("mmdebstrap", "unshare", "flock", "dpkg-deb") if shutil.which(n) is None]
    return f"{' and '.join(missing)} not installed (make deps)" if missing else ""


def package() -> Path:
    """Return the package, building it (half a minute; minutes the first time) where the cache has none.

    Raises RuntimeError with the last words of the build.
    """
    folder = image.cache() / "deb"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _key()
    with image._lock(folder / "lock"):
        if not path.is_dir():
            for old in folder.glob("*.log"):
                old.unlink()
            for old in (p for p in folder.iterdir() if p.is_dir()):
                if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(old)
            _build(path)
        os.utime(path)
    (made,) = path.glob("emupmem_*_all.deb")
    return made


def _build(path: Path) -> None:
    """Build next to its place, rename when finished; the log stays beside it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        environment = {**os.environ, "MIRROR": image.mirror(), "TESTS": TESTS, "DEB_BUILD_OPTIONS": ""}
        environment["EMUPMEM_CACHE"] = str(image.cache())
        argv = [str(PROJECT / ".packaging/deb.sh"), f"{work}/out"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"deb.sh: status {done.returncode}\n{said[-8000:]}")
        (Path(work) / "out/log").write_text(said)
        (Path(work) / "out").rename(path)


def _key() -> str:
    found = hashlib.sha256()
    for source in SOURCES:
        top = PROJECT / source
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(PROJECT)} {file.stat().st_mode:o}\n".encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


def log(made: Path) -> str:
    """What its build said."""
    return made.with_name("log").read_text()


def newer(made: Path, folder: Path) -> Path:
    """The same package once more in `folder`, with a higher version."""
    tree = folder / "newer"
    run(["dpkg-deb", "-R", str(made), str(tree)])
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*", rf"\g<0>{NEWER}", control.read_text(), flags=re.MULTILINE))
    target = folder / "emupmem-newer.deb"
    run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(target)])
    return target


# As py3compile wants it, which leaves alone what is there already.
COMPILE = """
import importlib.util, pathlib, py_compile, sys
tree, target, there = map(pathlib.Path, sys.argv[1:])
for file in tree.rglob("*.py"):
    name = file.relative_to(tree)
    made = target / pathlib.Path(importlib.util.cache_from_source(name))
    mode = py_compile.PycInvalidationMode.TIMESTAMP
    py_compile.compile(str(file), str(made), str(there / name), True, invalidation_mode=mode)
"""
PLACE = "usr/lib/python3/dist-packages/emupmem"


def compiled(made: Path, by: Image, folder: Path) -> dict[str, Content]:
    """The job files `compiled/…`, to be copied to `PLACE`: what the guest would compile when the package is set up.

    Its own Python has compiled it here; an emulated processor needs half a minute for that.
    """
    tree, target = folder / "unpacked", folder / "compiled"
    run(["dpkg-deb", "-x", str(made), str(tree)])
    run_python(by, COMPILE, str(tree / PLACE), str(target), f"/{PLACE}")
    return {f"compiled/{file.relative_to(target)}": file for file in target.rglob("*.pyc")}


if __name__ == "__main__":
    if why := lacking():
        sys.exit(f"emupmem: {why}")
    print(package())
