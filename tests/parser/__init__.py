"""The reader of boot logs."""
