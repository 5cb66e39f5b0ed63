"""Rows from wherever they lie: the Hub, a folder, a file, or a corpus made by code."""
