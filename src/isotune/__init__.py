"""Fine-tuning whose result does not depend on how it was run."""

__version__ = "0.1.0"
