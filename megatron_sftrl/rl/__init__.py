"""What reinforcement learning adds to a batch of responses."""
