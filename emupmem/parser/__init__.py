# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the text of a boot log becomes a memory map."""
