"""What is done with a trained model: evaluate it, ask it, let it predict, serve it."""
