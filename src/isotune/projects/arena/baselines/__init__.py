"""Classical models of which of two answers people prefer: what an encoder must beat to be worth its cost."""
