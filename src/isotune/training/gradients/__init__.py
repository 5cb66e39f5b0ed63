"""How gradients are summed over microbatches and ranks: by the engine, or exactly, as integers."""
