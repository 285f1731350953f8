# SPDX-License-Identifier: Apache-2.0
"""What others could try with files and programs."""
