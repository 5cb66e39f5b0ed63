"""What a run does when a loss is NaN or Inf, and when its device is out of memory."""
