"""What a run needs: memory, computation, communication, time."""
