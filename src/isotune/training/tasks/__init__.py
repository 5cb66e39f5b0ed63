"""What a model learns: the loss, denominator and metrics of its microbatches."""
