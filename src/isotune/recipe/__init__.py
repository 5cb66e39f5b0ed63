"""What a user may say of a run, and what contradicts: the layer that everything else reads from."""
