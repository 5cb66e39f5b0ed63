"""Texts to classify: predictions, the words that decide them, and errors of the evaluation like them."""
