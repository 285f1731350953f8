# SPDX-License-Identifier: Apache-2.0
"""A report of a machine: collected, masked, packed, read elsewhere."""
