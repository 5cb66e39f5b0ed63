"""What a run starts from: folders, Hub repositories, built-in models, their vocabulary and their head."""
