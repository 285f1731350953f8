# SPDX-License-Identifier: Apache-2.0
"""Real NVDIMMs: ndctl and ipmctl."""
