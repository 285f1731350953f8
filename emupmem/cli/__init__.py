# SPDX-License-Identifier: Apache-2.0
"""The command line: read what is asked, call a stage, show the result, choose the exit status."""
