"""The files of an exported model: each format is written, run and compared with the run's own model."""
