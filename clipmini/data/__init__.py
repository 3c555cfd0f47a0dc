"""From tars to batches. Nothing in here but `loader` knows Lightning, and nothing knows torch.distributed."""
