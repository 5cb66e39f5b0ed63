"""Adapters beside frozen weights: which layers they stand in, and how they are added."""
