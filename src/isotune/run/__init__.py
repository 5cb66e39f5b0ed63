"""The run directory: who may write to it, what it records, and how a run stops."""
