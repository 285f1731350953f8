# SPDX-License-Identifier: Apache-2.0
"""What stands in the way on this machine, each with one thing to do."""
