"""Trainer callbacks: checks before training, progress, early stopping, averages."""
