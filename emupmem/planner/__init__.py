"""Stage 2: a memory map and a request become a plan."""
