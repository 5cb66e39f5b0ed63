"""What is known of published throughput and memory figures beside the figures themselves."""
