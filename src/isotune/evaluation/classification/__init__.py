"""Classifiers: predictions, metrics, pictures, examples."""
