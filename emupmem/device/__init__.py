"""A pmem device: file systems, DAX, mounts, images, namespaces on RAM."""
