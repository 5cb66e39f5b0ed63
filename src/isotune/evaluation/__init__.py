"""How good a trained model is, measured apart from training."""
