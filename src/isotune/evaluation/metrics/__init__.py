"""Metrics of classes, probabilities and texts, each with an interval."""
