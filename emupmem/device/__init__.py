# SPDX-License-Identifier: Apache-2.0
"""A pmem device: file systems, DAX, mounts, images, namespaces on RAM."""
