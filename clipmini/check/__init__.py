"""What would make a run fail, or waste it, before it is queued."""
