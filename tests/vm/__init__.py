"""Virtual machines for tests: whole Debian guests booted through their own GRUB, and bare kernels."""
