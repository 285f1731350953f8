# SPDX-License-Identifier: Apache-2.0
"""The kernel's own rules: its command line, its memory map, its versions."""
