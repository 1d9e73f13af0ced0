"""The planner's layer: workload, cost model, simulator and search."""
