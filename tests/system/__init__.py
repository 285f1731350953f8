"""What others could try with files and programs."""
