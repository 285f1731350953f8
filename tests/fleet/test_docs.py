# SPDX-License-Identifier: Apache-2.0
"""What Ansible's own tools say of the collection: documentation, and checks of its form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.fleet import build
from tests.fleet.control import Control

pytestmark = pytest.mark.slow(seconds=20)

MODULES = ("reservation", "verify", "emupmem_info", "namespace")
SANITY = (
    *(
        "action-plugin-docs",
        "ansible-doc",
        "compile",
        "empty-init",
        "line-endings",
        "no-assert",
        "no-get-exception",
    ),
    *("no-illegal-filenames", "no-smart-quotes", "pep8", "replace-urlopen", "runtime-metadata", "shebang"),
    *("symlinks", "use-argspec-type-path", "use-compat-six", "validate-modules", "yamllint"),
)
"""Of `ansible-test sanity`: not those that need PowerShell and the like, and not pylint, for ruff is that here."""


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Control:
    return Control(tmp_path_factory.mktemp("control"), "")


def documented(control: Control, kind: str, *names: str) -> dict[str, Any]:
    full = [f"emupmem.emupmem.{name}" for name in names]
    done = control.ansible("ansible-doc", "--json", "-t", kind, *full)
    assert done.returncode == 0, done.stderr
    shown = control.ansible("ansible-doc", "-t", kind, *full)
    assert shown.returncode == 0, shown.stderr
    assert "ERROR" not in shown.stdout + shown.stderr
    return {name.rpartition(".")[2]: value for name, value in json.loads(done.stdout).items()}


def test_documentation_is_shown_for_all(control: Control) -> None:
    found = documented(control, "module", *MODULES)
    assert set(found) == set(MODULES)
    for name, module in found.items():
        assert module["doc"]["options"]["program"]["type"] == "path", name
        assert module["examples"], name
        assert module["return"], name


def test_the_role_takes_what_the_module_takes(control: Control) -> None:
    """Ansible has one place for the options of modules, and another one for those of roles."""
    module = documented(control, "module", "reservation")["reservation"]["doc"]["options"]
    role = documented(control, "role", "emupmem")["emupmem"]["entry_points"]["main"]["options"]
    assert set(module) - {name.removeprefix("emupmem_") for name in role} == {
        *("state", "existing", "nokaslr", "program")
    }
    same = {n: o for n, o in module.items() if f"emupmem_{n}" in role and n not in ("size", "trial")}
    assert len(same) == 9
    for name, option in same.items():
        theirs = role[f"emupmem_{name}"]
        for key in ("type", "elements", "choices"):
            assert theirs.get(key) == option.get(key), name
        assert name == "keep" or option.get("default", theirs["default"]) == theirs["default"], name
    defaults = (build.SOURCE / "roles/emupmem/defaults/main.yml").read_text()
    given = dict(re.findall(r"^(emupmem_\w+): (.*?)(?:  #.*)?$", defaults, re.MULTILINE))
    assert {n: o["default"] for n, o in role.items() if "default" in o} == {
        n: _value(text) for n, text in given.items() if n != "emupmem_size"
    }


def test_the_examples_can_be_copied(control: Control) -> None:
    examples = build.SOURCE / "playbooks"
    words = ("-i", str(examples / "hosts.ini"), str(examples / "site.yml"))
    done = control.ansible("ansible-playbook", *words, "--syntax-check")
    assert done.returncode == 0, done.stderr
    listed = control.ansible("ansible-inventory", "-i", str(examples / "hosts.ini"), "--list")
    found = json.loads(listed.stdout)
    assert len(found["pmem"]["hosts"]) == 21
    sizes = {host: values["emupmem_size"] for host, values in found["_meta"]["hostvars"].items()}
    assert (sizes["lab07.example.org"], sizes["big.example.org"]) == ("16G", "64G")


def _value(text: str) -> Any:
    """A plain value of YAML."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_ansible_test_finds_nothing(control: Control) -> None:
    assert build.sanity(control.folder / "collections", SANITY) == ""
