"""Language models: generated answers, their metrics, chat."""
