# SPDX-License-Identifier: Apache-2.0
"""Devices, file systems, images."""
