# SPDX-License-Identifier: Apache-2.0
"""The shape of the program: which module may touch the machine, and what may not be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import PROJECT
from tests.test_structure import seen_in

PACKAGE = PROJECT / "emupmem"
IMPURE = {"os", "subprocess", "shutil", "socket", "tempfile", "fcntl", "signal", "platform", "mmap", "ctypes"}
SYSTEM = (
    "machine",
    "programs",
    "files",
    "plain",
    "pipe",
    "backups",
    "lock",
    "processes",
    "accounts",
    "streams",
    "errors",
    "sysfs",
    "latency",
)
MAY = {
    **{f"system/{name}.py": IMPURE for name in SYSTEM},  # files, programs and locks
    "editor/shell.py": {"os", "fcntl"},  # run_sh: sh is the judge of edits, its texts are memory files
    "editor/cage.py": {"os", "subprocess", "ctypes", "signal"},  # what sh cannot get out of
    "editor/cage_plan.py": {"ctypes"},
    "editor/cage_libc.py": {"os", "ctypes", "signal"},
    "editor/cage_root.py": {"os", "subprocess", "ctypes", "signal"},
    "editor/cage_rules.py": {"os", "ctypes", "platform"},
    "device/image.py": {"os", "fcntl", "mmap", "ctypes"},  # copies devices, in threads, past the page cache
    "device/chunks.py": {"os", "fcntl", "mmap", "ctypes"},
    "device/freeze.py": {"os", "fcntl"},
    "device/checksum.py": {"os"},
    "device/dax.py": {"os", "mmap", "ctypes"},  # one nameless file, mapped and touched
    "device/latency.py": {"os"},  # opens what is measured, for reading only
    "demo/disk.py": {"shutil", "tempfile"},  # makes and keeps the disk of a guest
    "demo/guest.py": {"os", "subprocess", "tempfile"},  # runs QEMU, and listens to it
    "cli/demo.py": {"tempfile"},  # a copy of that disk for each run
    "__main__.py": {"signal"},  # Ctrl-C while it starts
    "cli/main.py": {"os", "signal"},  # one environment variable, the status of Ctrl-C
    "collection/plugins/module_utils/program.py": {"os"},  # asks whether a program is there
    "cli/terminal.py": {"os"},  # how wide it is, and what the environment says of colours
    "cli/stdio.py": {"os"},  # empties the buffer of a stream that fails
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The packages that a module imports from."""
    found = [(one.module,) if one.module else one.names for one in seen_in(path).imports]
    return {name.partition(".")[0] for names in found for name in names}


def test_only_the_machine_touches_the_machine() -> None:
    assert {
        name_of(p): left for p in MODULES if (left := imports(p) & IMPURE - MAY.get(name_of(p), set()))
    } == {}


def test_no_click_and_no_shell() -> None:
    for path in MODULES:
        assert "click" not in imports(path), path
        text = path.read_text()
        assert "shell=True" not in text, path
        assert "os.system" not in text, path


def test_every_file_names_its_license() -> None:
    for path in MODULES:
        modules = name_of(path).startswith("collection/plugins/")  # as Ansible's own are
        terms = "GPL-3.0-or-later" if modules else "Apache-2.0"
        assert path.read_text().startswith(f"# SPDX-License-Identifier: {terms}\n"), path


def test_pure_stages_do_not_import_the_machine() -> None:
    folders = ("kernel", "parser", "planner", "editor", "verifier")
    pure = [
        PACKAGE / f"{name}.py" for name in ("model", "units", "boot/grub/menu", "boot/bls/text", "boot/entry")
    ]
    for path in (*pure, *(p for folder in folders for p in (PACKAGE / folder).glob("*.py"))):
        modules = {one.module for one in seen_in(path).imports}
        if path.stem not in ("survey", "observe"):  # these look, and call the stage
            assert not any(m.startswith("emupmem.system") for m in modules), path
        assert "emupmem.cli.main" not in modules


def test_suggest_from_a_log_loads_neither_augeas_nor_the_transaction(tmp_path: Path) -> None:
    import subprocess

    from tests.fake import LOG

    (tmp_path / "log").write_text(LOG)
    code = (
        "import sys; sys.argv = ['emupmem', 'suggest', '--json', '--from', sys.argv[1]]\n"
        "from emupmem.__main__ import start\n"
        "try: start()\n"
        "finally: print([m for m in sys.modules if m.split('.')[0] == 'augeas' or m == 'rich.console'"
        " or m.startswith(('emupmem.boot.prepare', 'emupmem.editor', 'emupmem.verifier'))], file=sys.stderr)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_command_line_imports_late_only_with_a_reason() -> None:
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        lines = path.read_text().splitlines()
        late = [lines[one.line - 1] for one in seen_in(path).imports if one.late]
        assert not [line for line in late if "#" not in line], path


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_runs_no_command_imports_none(option: str) -> None:
    import subprocess

    code = (
        f"import sys; sys.argv = ['emupmem', '{option}']\n"
        "from emupmem.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({m.split('.')[1] for m in sys.modules if m.startswith('emupmem.')}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['cli', 'model', 'record', 'units']"
