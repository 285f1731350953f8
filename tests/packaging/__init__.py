# SPDX-License-Identifier: Apache-2.0
"""How the program is packed, and what it is packed with."""
