# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: verify
short_description: Prove that a reservation became a device
description:
  - Calls C(emupmem verify) once. Every step is looked at, from the boot configuration to DAX.
  - Fails with the first step that is not as it should be, unless O(required=false).
version_added: "1.0.0"
author:
  - the authors of emupmem (@emupmem)
extends_documentation_fragment:
  - emupmem.emupmem.emupmem
attributes:
  check_mode:
    description: Nothing is ever written.
    support: full
  diff_mode:
    description: Nothing is ever written.
    support: none
options:
  wait:
    description: Seconds to wait for the device to appear.
    type: int
    default: 10
  required:
    description: Fail where anything is not as it should be, or nothing is reserved. Else only tell.
    type: bool
    default: true
  trial:
    description: A running trial is as it should be, although it is not permanent.
    type: bool
    default: false
seealso:
  - module: emupmem.emupmem.reservation
"""

EXAMPLES = r"""
- name: Prove that it is there
  emupmem.emupmem.verify:

- name: Look how it is
  emupmem.emupmem.verify:
    required: false
  register: seen
"""

RETURN = r"""
ok:
  description: Whether all is as planned.
  type: bool
  returned: always
pending:
  description: Whether the next start brings it.
  type: bool
  returned: always
trial:
  description: How a trial stands, V(none), V(waiting), V(running) or V(over).
  type: str
  returned: always
checks:
  description: The steps, each with C(name), C(status), C(expected), C(found) and C(hint).
  type: list
  elements: dict
  returned: always
devices:
  description: The devices, each with C(dev), C(start) and C(size) in bytes.
  type: list
  elements: dict
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.emupmem.emupmem.plugins.module_utils.program import (
    NOT_AS_ASKED,
    OK,
    OPTIONS,
    Emupmem,
)

STAGES = {"ok": "running", "pending": "waiting", "fail": "over"}


def main():
    module = AnsibleModule(
        argument_spec=dict(
            OPTIONS,
            wait=dict(type="int", default=10),
            required=dict(type="bool", default=True),
            trial=dict(type="bool", default=False),
        ),
        supports_check_mode=True,
    )
    options = module.params
    words = ["verify", "--wait", str(options["wait"]), *(["--require"] if options["required"] else [])]
    result = Emupmem(module).ask(words, (OK, NOT_AS_ASKED))[1]
    checks = result["checks"]
    tried = next((c for c in checks if c["name"] == "trial"), None)
    result["trial"] = STAGES.get(tried["status"], "over") if tried else "none"
    broken = next((c for c in checks if c["status"] in ("fail", "pending")), None)
    good = result["ok"] or (options["trial"] and result["trial"] == "running" and broken is None)
    if options["required"] and not good:
        said = f"{broken['name']}: {broken['found']}; {broken['hint']}" if broken else "nothing is reserved"
        module.fail_json(msg=said, **result)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
