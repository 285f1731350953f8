"""Stage 3: the text of GRUB's defaults becomes a new text."""
