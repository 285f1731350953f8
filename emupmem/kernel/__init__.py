"""The kernel's own rules: its command line, its memory map, its versions."""
