# SPDX-License-Identifier: Apache-2.0
"""The whole job in a throw-away virtual machine: its disk, its boots, what is done in it."""
