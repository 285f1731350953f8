"""`python -m emupmem` is the same as `emupmem`."""

from emupmem.cli.main import main

main()
