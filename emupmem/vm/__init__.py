# SPDX-License-Identifier: Apache-2.0
"""Handing a device to QEMU as a vNVDIMM."""
