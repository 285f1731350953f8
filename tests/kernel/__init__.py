"""What the kernel does with its command line."""
