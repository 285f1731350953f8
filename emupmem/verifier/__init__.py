# SPDX-License-Identifier: Apache-2.0
"""Stage 4: what was seen of a machine becomes a ladder of checks."""
