# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: emupmem_info
short_description: Plan a reservation without changing anything
description:
  - Calls C(emupmem suggest) once, and C(emupmem collect) where O(archive) is given.
version_added: "1.0.0"
author:
  - the authors of emupmem (@emupmem)
extends_documentation_fragment:
  - emupmem.emupmem.emupmem
  - emupmem.emupmem.emupmem.plan
attributes:
  check_mode:
    description: Nothing of the host is changed; O(archive) is written all the same.
    support: full
  diff_mode:
    description: Nothing of the host is changed.
    support: none
options:
  size:
    description: Size of each device, such as V(16G); left away, the largest that is sensible.
    type: str
  archive:
    description:
      - Also write an archive of all that the plan rests on to this file on the host, replacing it. Secrets are masked.
      - C(emupmem suggest --from) and C(doctor --from) read it on any machine.
    type: path
"""

EXAMPLES = r"""
- name: What would fit
  emupmem.emupmem.emupmem_info:
    size: 16G
  register: planned

- name: Say it
  ansible.builtin.debug:
    msg: "{{ planned.plan.memmap if planned.plan else planned.error }}"
"""

RETURN = r"""
plan:
  description: The plan with C(memmap), C(reservations), C(ram_left) and C(warnings), or nothing.
  type: dict
  returned: always
refused:
  description: Why C(reservation) would refuse on this host (C(message), C(hint)), or nothing.
  type: dict
  returned: always
ranges:
  description: The firmware's memory map, each with C(start), C(size) in bytes and C(type).
  type: list
  elements: dict
  returned: always
ram:
  description: The RAM of that map in bytes.
  type: int
  returned: always
loader:
  description: What starts the host.
  type: str
  returned: always
error:
  description: Why there is no plan.
  type: str
  returned: where there is none
archive:
  description: The archive that was written.
  type: str
  returned: where one was asked for
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.emupmem.emupmem.plugins.module_utils.program import (
    FAILED,
    OK,
    PLAN_OPTIONS,
    Emupmem,
    plan_words,
)


def main():
    module = AnsibleModule(
        argument_spec=dict(
            PLAN_OPTIONS,
            archive=dict(type="path"),
        ),
        supports_check_mode=True,
    )
    options, program = module.params, Emupmem(module)
    result = program.ask(["suggest", *plan_words(options)], (OK, FAILED))[1]
    result["ram"] = sum(r["size"] for r in result["ranges"] if r["type"] == "usable")
    if options["archive"]:
        program.ask(["collect", options["archive"], "--force"])
        result["archive"] = options["archive"]
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
