"""Boot loaders: what the next start will tell the kernel, and how to change it."""
