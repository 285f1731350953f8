"""What stands in the way on this machine, each with one thing to do."""
