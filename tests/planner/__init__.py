# SPDX-License-Identifier: Apache-2.0
"""The planner: on maps, on logs, and where there must be no plan."""
