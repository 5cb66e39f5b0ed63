"""Prompts: whether a text commands, states or asks."""
