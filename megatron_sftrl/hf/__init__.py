"""Hugging Face model directories as files: weights read and written, and what travels beside them."""
