# SPDX-License-Identifier: Apache-2.0
"""The demo, as far as it needs no virtual machine: `make demo` runs all of it."""
