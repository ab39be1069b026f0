"""Demonstrations to TokenBatches: tokenizers, chat templates, row sources, order and packing."""
