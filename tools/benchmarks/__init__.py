"""What was measured, and with what: python -m tools.benchmarks.losses, in the root of the repository."""
