"""How a model is given the documents of a microbatch, which parts of it are its head, and which batches fit."""
