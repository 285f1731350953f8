"""Handing a device to QEMU as a vNVDIMM."""
