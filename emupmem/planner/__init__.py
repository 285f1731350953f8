# SPDX-License-Identifier: Apache-2.0
"""Stage 2: a memory map and a request become a plan."""
