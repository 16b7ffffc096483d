"""What a run will need, before any work."""
