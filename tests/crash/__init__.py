# SPDX-License-Identifier: Apache-2.0
"""Killed at every changing call, and every call that fails."""
