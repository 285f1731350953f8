"""A report of a machine: collected, masked, packed, read elsewhere."""
