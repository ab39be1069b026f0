"""`sftrl doctor loss`: proves that a loss means the same under every layout, on the user's machine."""
