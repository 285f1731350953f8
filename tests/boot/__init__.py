"""Boot loaders."""
