"""The editor of GRUB settings, and the cage around sh."""
