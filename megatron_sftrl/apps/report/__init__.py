"""The numbers of runs as one page."""
