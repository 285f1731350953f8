# SPDX-License-Identifier: Apache-2.0
"""Reserve RAM as emulated persistent memory, safely: plan, edit GRUB, prove it after the reboot."""

__version__ = "0.1.0"
