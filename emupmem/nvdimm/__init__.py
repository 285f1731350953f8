"""Real NVDIMMs: ndctl and ipmctl."""
