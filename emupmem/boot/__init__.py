# SPDX-License-Identifier: Apache-2.0
"""Boot loaders: what the next start will tell the kernel, and how to change it."""
