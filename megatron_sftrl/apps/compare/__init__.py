"""`sftrl compare`: which SFT leaves the best policy after RL, over several seeds, and how sure that is."""
