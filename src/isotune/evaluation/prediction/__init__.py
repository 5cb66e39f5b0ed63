"""New rows predicted by a model, in their order, on any number of processes, and kept as they come."""
