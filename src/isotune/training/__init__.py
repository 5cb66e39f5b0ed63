"""The stock Trainer, made to carry out the plan and to measure exactly."""
