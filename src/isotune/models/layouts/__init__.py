"""How a classifier of transformers is given the documents of a microbatch, and which parts of it are its head."""
