"""What a run learns of its data, shown before anything is trained."""
