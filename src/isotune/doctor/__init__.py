"""Everything about a machine that could spoil a run."""
