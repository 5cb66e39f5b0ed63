"""`isotune sweep`: a search over keys of a recipe, whose trials are ordinary runs."""
