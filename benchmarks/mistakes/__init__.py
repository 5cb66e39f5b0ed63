"""Wrong configurations, for the tests and benchmarks of what detects them."""
