# SPDX-License-Identifier: Apache-2.0
"""Stage 3: the text of GRUB's defaults becomes a new text."""
