"""Killed at every changing call, and every call that fails."""
