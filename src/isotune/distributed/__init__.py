"""Processes: how they start, find each other, and which engine they really run."""
