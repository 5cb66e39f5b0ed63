"""Wrong configurations, and what finds them."""
