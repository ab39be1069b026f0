"""`sftrl eval`: what a checkpoint answers, how often it is right, and how sure that is."""
