"""Checks of a machine for problems that would affect a run."""
