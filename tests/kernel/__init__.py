# SPDX-License-Identifier: Apache-2.0
"""What the kernel does with its command line."""
