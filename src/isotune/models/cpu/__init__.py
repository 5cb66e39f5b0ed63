"""Faster training and evaluation on CPU. Nothing here runs on a GPU."""
