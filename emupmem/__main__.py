"""`python -m emupmem` is the same as `emupmem`."""

from emupmem.cli import main

main()
