"""What is written is verified before it is called saved."""
