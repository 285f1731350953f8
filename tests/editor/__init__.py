# SPDX-License-Identifier: Apache-2.0
"""The editor of GRUB settings, and the cage around sh."""
