# SPDX-License-Identifier: Apache-2.0
"""Virtual machines for tests: whole Debian guests booted through their own GRUB, and bare kernels."""
