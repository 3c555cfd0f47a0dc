"""What a run was, on one page that needs nothing else, and what tells several runs apart."""
