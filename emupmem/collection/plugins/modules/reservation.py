# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: reservation
short_description: Reserve RAM as emulated persistent memory in the boot configuration
description:
  - Plans a range of RAM from the firmware's own memory map and gives it to the boot loader of the host, so that the
    next start has C(/dev/pmem0). The device is emulated and volatile, its content does not survive a power cycle.
  - Calls C(emupmem apply), C(remove), C(confirm) or C(abandon) once. Every edit is proven before it is written,
    and taken back where a boot entry does not come out as planned.
  - The host must be restarted for a change to take effect, which RV(reboot_required) tells.
version_added: "1.0.0"
author:
  - the authors of emupmem (@emupmem)
extends_documentation_fragment:
  - emupmem.emupmem.emupmem
  - emupmem.emupmem.emupmem.plan
attributes:
  check_mode:
    description: Nothing is written.
    support: full
  diff_mode:
    description: The difference of the configuration is shown.
    support: full
options:
  state:
    description:
      - V(present) reserves, V(absent) gives all of it back.
      - V(confirmed) makes the reservation of the running trial permanent. V(abandoned) takes a trial away.
    type: str
    choices: [present, absent, confirmed, abandoned]
    default: present
  size:
    description: Size of each device, such as V(16G) or V(512M). Needed for O(state=present).
    type: str
  existing:
    description: What happens to another reservation that is there already.
    type: str
    choices: [refuse, replace, add]
    default: refuse
  nokaslr:
    description: Also add C(nokaslr), for kernels that may place themselves in the range.
    type: bool
    default: false
  mount:
    description: For each device a folder where a DAX file system is mounted at every boot.
    type: list
    elements: path
    default: []
  fs:
    description: The file system of O(mount).
    type: str
    choices: [ext4, xfs]
  owner:
    description: Who owns what is mounted, as C(user) or C(user:group).
    type: str
  mode:
    description: The permissions of what is mounted, such as V('0770').
    type: str
  keep:
    description:
      - For each folder of O(mount) a file where its content is saved at an orderly shutdown, and brought back from.
      - A reservation that is given anew without it ends the saving; a warning says so.
    type: list
    elements: path
  trial:
    description:
      - Make a boot entry that the next start takes, and only that; if the host hangs, any reset starts the old one.
      - It is made permanent by O(state=confirmed) after the restart.
    type: bool
    default: false
seealso:
  - module: emupmem.emupmem.verify
  - module: emupmem.emupmem.emupmem_info
"""

EXAMPLES = r"""
- name: Reserve 16 GiB, for one start first
  emupmem.emupmem.reservation:
    size: 16G
    trial: true
  register: reserved

- name: Restart into it
  ansible.builtin.reboot:
  when: reserved.reboot_required

- name: Keep it
  emupmem.emupmem.reservation:
    state: confirmed

- name: Give everything back
  emupmem.emupmem.reservation:
    state: absent
"""

RETURN = r"""
memmap:
  description: The kernel argument after the change, empty for none.
  type: str
  returned: success
  sample: memmap=16G!4G
reboot_required:
  description: Whether the host must be restarted for it.
  type: bool
  returned: success
would_change:
  description: Whether there was anything to do.
  type: bool
  returned: success
backup:
  description: The file that keeps the former configuration.
  type: str
  returned: changed
mounts:
  description: What is mounted at every boot after the change.
  type: list
  elements: dict
  returned: where there is any
trial:
  description: How a trial stood before it was confirmed or abandoned.
  type: str
  returned: O(state=confirmed) and O(state=abandoned)
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.emupmem.emupmem.plugins.module_utils.program import (
    FAILED,
    NOT_AS_ASKED,
    OK,
    PLAN_OPTIONS,
    Emupmem,
    need,
    plan_words,
)


def _words(options, check):
    words = ["apply", *plan_words(options), "--check" if check else "--yes"]
    words += [f"--{options['existing']}"] if options["existing"] != "refuse" else []
    words += ["--nokaslr"] if options["nokaslr"] else []
    for folder in options["mount"]:
        words += ["--mount", folder]
    for file in options["keep"] or []:
        words += ["--keep", file]
    for name in ("fs", "owner", "mode"):
        words += [f"--{name}", options[name]] if options[name] else []
    return words


def _apply(program, options, check):
    if not options["trial"]:
        return program.ask(_words(options, check), (OK, NOT_AS_ASKED) if check else (OK,))[1]
    # What is permanent as asked needs no trial.
    result = program.ask(_words(options, True), (OK, NOT_AS_ASKED))[1]
    if not result.get("would_change", True):
        return result
    return program.ask([*_words(options, check), "--trial"], (OK, NOT_AS_ASKED) if check else (OK,))[1]


def _end_trial(program, command, check):
    """Confirm or abandon it. Where there is none, the end that was asked for may be reached already."""
    status, result = program.ask([command, "--dry-run" if check else "--yes"], (OK, FAILED))
    need(result, "trial", program.module)
    if not status:
        return result
    if result["trial"] != "none" or (command == "confirm" and not _is_permanent(program)):
        program.fail(result["error"], result)
    return {name: value for name, value in result.items() if name != "error"}


def _is_permanent(program):
    """Whether this boot has what the configuration reserves, and all is as it should be."""
    return program.ask(["verify", "--require"], (OK, NOT_AS_ASKED))[0] == OK


def main():
    module = AnsibleModule(
        argument_spec=dict(
            PLAN_OPTIONS,
            state=dict(
                type="str", choices=["present", "absent", "confirmed", "abandoned"], default="present"
            ),
            existing=dict(type="str", choices=["refuse", "replace", "add"], default="refuse"),
            nokaslr=dict(type="bool", default=False),
            mount=dict(type="list", elements="path", default=[]),
            fs=dict(type="str", choices=["ext4", "xfs"]),
            owner=dict(type="str"),
            mode=dict(type="str"),
            keep=dict(type="list", elements="path", no_log=False),
            trial=dict(type="bool", default=False),
        ),
        required_if=[("state", "present", ("size",))],
        required_by={"fs": "mount", "owner": "mount", "mode": "mount"},
        supports_check_mode=True,
    )
    program, check, state = Emupmem(module), module.check_mode, module.params["state"]
    if state == "present":
        result = _apply(program, module.params, check)
    elif state == "absent":
        result = program.ask(["remove", "--dry-run" if check else "--yes"])[1]
    else:
        result = _end_trial(program, "confirm" if state == "confirmed" else "abandon", check)
    need(result, "would_change", module)
    for warning in result.pop("warnings", ()):
        module.warn(warning)
    diff = {"diff": {"prepared": result.pop("diff")}} if module._diff and result["diff"] else {}
    result.pop("diff", None)
    result["changed"] = result["would_change"] if check else result["changed"]
    module.exit_json(**result, **diff)


if __name__ == "__main__":
    main()
