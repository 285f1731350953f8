# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of everything that reads what others wrote: `python -m tests.fuzz --help`."""
