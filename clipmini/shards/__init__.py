"""What `clipmini shards` does: shards made of other files, counted, verified, looked up."""
