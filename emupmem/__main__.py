# SPDX-License-Identifier: Apache-2.0
"""`python -m emupmem` is the same as `emupmem`."""

from emupmem.cli.main import main

main()
