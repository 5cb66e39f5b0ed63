"""From a named source to the plan of microbatches; nothing here knows how many processes will run it."""
