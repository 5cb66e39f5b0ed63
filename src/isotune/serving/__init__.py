"""A finished run as a page and an API on this machine: what `isotune serve` starts."""
