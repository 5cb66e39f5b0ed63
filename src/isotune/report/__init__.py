"""Reports on finished runs: HTML report, loss curve, model card, comparison and job summary."""
