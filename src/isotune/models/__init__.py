"""Models that keep packed documents apart: attention, loss head, loading, adapters and export."""
