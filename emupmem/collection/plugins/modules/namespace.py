# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: namespace
short_description: Namespaces of real and virtual NVDIMMs
description:
  - Makes a namespace where there is none like it, or destroys one.
  - Calls C(emupmem nvdimm create) or C(emupmem nvdimm destroy) once, which judge before ndctl is run.
  - What is mounted, used as swap, open or in use as RAM is never taken away, O(force) or not.
version_added: "1.0.0"
author:
  - the authors of emupmem (@emupmem)
extends_documentation_fragment:
  - emupmem.emupmem.emupmem
attributes:
  check_mode:
    description: Nothing is written.
    support: full
  diff_mode:
    description: The namespace before and after it is shown.
    support: full
options:
  state:
    description:
      - With V(present) a namespace is there that is as the other options say. It is made only where there is none.
      - With V(absent) there is none of this O(name).
    type: str
    choices: [present, absent]
    default: present
  name:
    description:
      - With O(state=present) a name of its own, which the label of the namespace keeps. Without one, any that is as
        asked will do, so that two of the same kind in one region need names.
      - With O(state=absent) such a name, or what the kernel calls it, such as V(namespace0.0) or V(/dev/pmem0).
        The kernel gives its names anew.
    type: str
  region:
    description: Such as V(region0); left away, the first with labels and room.
    type: str
  mode:
    description: What kind of device it becomes.
    type: str
    choices: [fsdax, devdax, sector, raw]
    default: fsdax
  size:
    description:
      - What it takes of its region, its page map and all, such as V(64G).
      - Left away, a new one takes all that is free, and one that is there may have any size.
    type: str
  map:
    description: Where the page map is kept, in RAM or on the device itself.
    type: str
    choices: [mem, dev]
  align:
    description: The page size that it is aligned to, such as V(2M).
    type: str
  force:
    description:
      - Content may be lost, with O(state=absent), or where a region without labels has its one namespace, which gets
        another mode. Without it the module fails there, also in check mode.
    type: bool
    default: false
seealso:
  - module: emupmem.emupmem.reservation
"""

EXAMPLES = r"""
- name: A namespace for the database
  emupmem.emupmem.namespace:
    name: db
    mode: devdax
    size: 64G
  register: made

- name: All the rest for a file system
  emupmem.emupmem.namespace:
    name: files

- name: Destroy it with all that is on it
  emupmem.emupmem.namespace:
    name: db
    state: absent
    force: true
"""

RETURN = r"""
would_change:
  description: Whether there was anything to do.
  type: bool
  returned: success
namespace:
  description:
    - The namespace that was made, is there, or is gone, with C(name), C(region), C(mode), C(size) in bytes and more.
    - Nothing where it was not made, in check mode, or was not there.
  type: dict
  returned: success
device:
  description: Its device, empty where there is none.
  type: str
  returned: success
  sample: /dev/pmem0
holds:
  description: What of a file system of before is still on it, such as V(ext4).
  type: str
  returned: O(state=present)
loses:
  description: The namespace whose content is lost by it, or nothing.
  type: dict
  returned: always
commands:
  description: What is run for it, each as a list of words.
  type: list
  elements: list
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.emupmem.emupmem.plugins.module_utils.program import (
    FAILED,
    NOT_AS_ASKED,
    OK,
    OPTIONS,
    Emupmem,
    need,
)

WISH = ("name", "region", "mode", "size", "map", "align")


def _words(options):
    if options["state"] == "absent":
        return ["destroy", options["name"], "--if-exists"]
    words = ["create", "--if-not-exists"]
    for name in WISH:
        words += [f"--{name}", options[name]] if options[name] else []
    return words


def _difference(options, result):
    """The namespace before and after, as far as it is known before."""
    if not result["would_change"]:
        return {}
    wished = {name: options[name] for name in WISH if options[name]}
    made = result["namespace"] or {**wished, "region": result["region"]}
    return {
        "diff": {
            "before": {"namespace": result["loses"]},
            "after": {"namespace": made if options["state"] == "present" else None},
        }
    }


def main():
    module = AnsibleModule(
        argument_spec=dict(
            OPTIONS,
            state=dict(type="str", choices=["present", "absent"], default="present"),
            name=dict(type="str"),
            region=dict(type="str"),
            mode=dict(type="str", choices=["fsdax", "devdax", "sector", "raw"], default="fsdax"),
            size=dict(type="str"),
            map=dict(type="str", choices=["mem", "dev"]),
            align=dict(type="str"),
            force=dict(type="bool", default=False),
        ),
        required_if=[("state", "absent", ("name",))],
        supports_check_mode=True,
    )
    options, program, check = module.params, Emupmem(module), module.check_mode
    # Without --yes emupmem asks where something is lost, and here is nobody to ask.
    how = ["--check"] if check else ["--yes"] if options["force"] else []
    status, result = program.ask(["nvdimm", *_words(options), *how], (OK, FAILED, NOT_AS_ASKED))
    need(result, "loses", module)
    if result["loses"] and not options["force"]:
        lost = result["loses"]
        where = f" ({lost['dev']})" if lost["dev"] else ""
        program.fail(
            f"all content of {lost['name']}{where}, {lost['mode']}, is lost by it: force allows that", result
        )
    if status == FAILED:
        program.fail(result["error"], result)
    difference = _difference(options, result) if module._diff else {}
    result["changed"] = result["would_change"] if check else result["changed"]
    module.exit_json(**result, **difference)


if __name__ == "__main__":
    main()
