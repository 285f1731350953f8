# SPDX-License-Identifier: Apache-2.0
"""Build and cache the Debian trees that scenarios are played in: `python -m tests.scenario.tree grub`.

A tree is a folder that mmdebstrap makes, with the real boot loader programs and, in /opt/emupmem, what
emupmem needs. It is never written to: each scenario puts an overlay on it. The trees lie under
~/.cache/emupmem/scenario (or $EMUPMEM_CACHE) by the hash of all that decides their content; packages and
wheels are shared with `tests.vm.image`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm import image
from tests.vm.machine import run

BASE = ("python3", "python3-venv", "libaugeas0", "e2fsprogs", "kmod", "mount", "util-linux")
PROJECT_PLACE = "/opt/project"
"""Where a scenario mounts the project, read-only."""

KEPT_SECONDS = 7 * 24 * 3600

SHIM = Path(__file__).with_name("shim.c")
"""Preloaded into all programs; this host's compiler builds it."""

# grub-pc's maintainer script makes /etc/default/grub; without a device to install to it installs nothing.
GRUB_SETUP = "test -s /etc/default/grub\n"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a tree is made of: Debian suite, packages, and a script that runs in it at the end."""

    suite: str
    packages: tuple[str, ...]
    setup: str = ""


RECIPES = {
    "grub": Recipe(
        "bookworm", ("grub-pc", "rpm", "btrfs-progs", "ndctl", "ipmctl", "python3-apt"), GRUB_SETUP
    ),
    "libvirt": Recipe(
        "bookworm",
        ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients", "qemu-system-x86", "qemu-utils"),
    ),
    "systemd": Recipe(
        "trixie",
        (
            *("systemd", "systemd-boot", "systemd-boot-efi", "systemd-boot-tools", "systemd-ukify"),
            *("dracut-core", "grub2-common", "grub-pc-bin", "refind", "btrfs-progs", "ndctl", "ostree"),
            *("sbsigntool", "binutils"),
        ),
    ),
}
"""The trees by name."""

COMMAND = """#!/bin/sh
# What Python compiles does not fit into the read-only project.
export PYTHONPYCACHEPREFIX=/var/cache/emupmem-pyc
exec /opt/emupmem/bin/python -m emupmem "$@"
"""


def tree(name: str) -> Path:
    """Return the folder of a tree of RECIPES, building it (a minute or two) where the cache has none.

    Raises KeyError for an unknown name, RuntimeError with the output of the tool that failed.
    """
    recipe = RECIPES[name]
    trees = image.cache() / "scenario"
    trees.mkdir(parents=True, exist_ok=True)
    path = trees / f"{name}-{_key(recipe)}"
    with image._lock(trees / f"{name}.lock"):
        if not path.is_dir():
            _forget_old(trees, name)
            _build(recipe, name, path)
        os.utime(path)
    return path


def _forget_old(trees: Path, name: str) -> None:
    """Remove trees that were not used for long: another checkout's recipe may differ, and its tree be in use."""
    for path in trees.glob(f"{name}-*"):
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            run(["rm", "-rf", "--one-file-system", str(path)])


def lacking() -> str:
    """What keeps a tree from being built here, in one line; empty where nothing does."""
    if os.geteuid() != 0:
        return "a scenario needs root: files of many owners, mounts and namespaces"
    missing = [n for n in ("mmdebstrap", "chroot", "unshare", "gcc") if shutil.which(n) is None]
    return f"{' and '.join(missing)} not installed (make deps)" if missing else ""


def _key(recipe: Recipe) -> str:
    parts = [recipe.suite, BASE, recipe.packages, recipe.setup, _setup(recipe), COMMAND, SHIM.read_text()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _setup(recipe: Recipe) -> str:
    """The script that is run in the tree at the end."""
    environment = image._fill(image.ENVIRONMENT).replace("/job/src", PROJECT_PLACE)
    return f"#!/bin/bash\nset -eu\n{recipe.setup}{environment}"


def _build(recipe: Recipe, name: str, path: Path) -> None:
    """Make a tree next to its place and rename it there when it is finished."""
    began = time.monotonic()
    image.to_stderr(f"scenario tree {name}: building it from Debian {recipe.suite} (a minute or two)")
    work = Path(tempfile.mkdtemp(prefix=f"{name}-tmp-", dir=path.parent))
    try:
        hook = work / "customize"
        hook.write_text(_customize(recipe, work))
        hook.chmod(0o755)
        _mmdebstrap(recipe, work / "tree", hook)
        (work / "tree").rename(path)
    finally:
        run(["rm", "-rf", "--one-file-system", str(work)])
    image.to_stderr(f"scenario tree {name}: built in {time.monotonic() - began:.0f} s")


def _mmdebstrap(recipe: Recipe, target: Path, hook: Path) -> None:
    archives = shlex.quote(str(_folder("archives", recipe.suite)))
    packages = ",".join((*BASE, *recipe.packages))
    argv = ["mmdebstrap", "--mode=root", "--variant=apt", f"--include={packages}", "--quiet"]
    argv += ['--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Languages "none"']
    argv += ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{n}/*" for n in ("man", "locale", "doc", "info")]
    argv += ["--skip=download/empty,essential/unlink,cleanup/apt/cache"]
    copy = f'mkdir -p "$1/var/cache/apt/archives"; cp -n {archives}/*.deb "$1/var/cache/apt/archives/"'
    argv += [f"--setup-hook={copy} 2>/dev/null || true", f"--customize-hook={hook}"]
    environment = [f"{name}={value}" for name, value in image._environment().items()]
    run(["env", "-i", *environment, *argv, recipe.suite, str(target), image.mirror()])


def _customize(recipe: Recipe, work: Path) -> str:
    """Return the script that mmdebstrap runs on the host at the end, the tree's path as its argument."""
    (work / "setup").write_text(_setup(recipe))
    (work / "emupmem").write_text(COMMAND)
    build = ["gcc", "-Os", "-shared", "-fPIC", "-nostdlib", "-fno-stack-protector", "-fno-builtin"]
    run([*build, "-o", str(work / "shim.so"), str(SHIM)])
    wheels = _folder("wheels", f"{recipe.suite}-{image._digest(image.dependencies())}")
    archives = _folder("archives", recipe.suite)
    here = shlex.quote(str(work))
    return f"""#!/bin/bash
set -eu
install -m 755 {here}/setup "$1/var/tmp/setup"
install -m 755 {here}/emupmem "$1/usr/local/bin/emupmem"
mkdir -p "$1/var/tmp/wheels"
cp -n {wheels}/*.whl "$1/var/tmp/wheels/" 2>/dev/null || true
# The host's certificates for pip, gone again when it is done.
if [ -n "${{HOST_CA:-}}" ]; then
    cp -L "$HOST_CA" "$1/var/tmp/ca.pem"
    export SSL_CERT_FILE=/var/tmp/ca.pem PIP_CERT=/var/tmp/ca.pem
fi
chroot "$1" /var/tmp/setup
# New packages and wheels become visible in the cache as a whole or not at all.
for file in "$1"/var/tmp/wheels/*.whl "$1"/var/cache/apt/archives/*.deb; do
    case $file in *.whl) to={wheels} ;; *) to={archives} ;; esac
    [ -e "$file" ] && [ ! -e "$to/${{file##*/}}" ] || continue
    cp "$file" "$to/.new.$$"
    mv "$to/.new.$$" "$to/${{file##*/}}"
done
rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/tmp/* "$1"/root/.cache
: >"$1/etc/machine-id"
install -D -m 755 {here}/shim.so "$1/usr/local/lib/scenario.so"
echo /usr/local/lib/scenario.so >"$1/etc/ld.so.preload"
"""


def _folder(kind: str, name: str) -> Path:
    folder = image.cache() / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: Sequence[str]) -> int:
    """Build the trees named on the command line and print their folders."""
    if not arguments or set(arguments) - set(RECIPES):
        print(f"usage: python -m tests.scenario.tree {{{'|'.join(RECIPES)}}}...", file=sys.stderr)
        return 2
    for name in arguments:
        print(tree(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
