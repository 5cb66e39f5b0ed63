"""Runs compared on the same rows: pairing, tests of every metric, changed rows."""
