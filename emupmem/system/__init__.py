# SPDX-License-Identifier: Apache-2.0
"""The one impure package: every open, rename, lock and program of emupmem is here."""
