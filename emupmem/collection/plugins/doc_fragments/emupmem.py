# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: the authors of emupmem
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the documentation of several modules says."""

from __future__ import annotations


class ModuleDocFragment:
    """The options that `plugins/module_utils/program.py` has the specification of."""

    DOCUMENTATION = r"""
attributes:
  platform:
    description: Linux on x86-64.
    support: full
    platforms: linux
options:
  program:
    description: The emupmem of the host, where it is not found by its name.
    type: path
"""

    PLAN = r"""
options:
  count:
    description: How many devices.
    type: int
    default: 1
  numa_node:
    description: Only memory of this NUMA node.
    type: int
  far:
    description:
      - Only memory of the NUMA node that is farthest from the processors of the first, as slower memory would be.
      - Fails on a host with one node. Not together with O(numa_node).
    type: bool
    default: false
  min_free:
    description: How much RAM must stay for the system.
    type: str
    default: 2G
"""
