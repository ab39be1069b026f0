"""What the user sees of a run: its directory, its numbers, its times, its memory, its report."""
