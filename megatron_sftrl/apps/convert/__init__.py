"""Hugging Face directories to checkpoints and back, without building a model."""
