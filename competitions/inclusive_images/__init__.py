"""Inclusive Images: multi-label classification with 7,178 labels, and label embeddings for it."""
