"""Classical models of which of two answers people prefer: the baselines that an encoder must beat."""
