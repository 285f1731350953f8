"""GRUB with a menu made by grub-mkconfig."""
