"""Start the processes of a launch, connect them, and check which engine they run."""
