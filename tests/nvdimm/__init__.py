"""NVDIMMs."""
