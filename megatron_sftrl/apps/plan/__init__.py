"""What a run will need, before a GPU is asked for: memory, communication, time, layouts that fit."""
