"""The planner: on maps, on logs, and where there must be no plan."""
