"""Devices, file systems, images."""
