# SPDX-License-Identifier: Apache-2.0
"""GRUB with a menu made by grub-mkconfig."""
