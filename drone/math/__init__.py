"""Tensors in, tensors out: moments and factorizations. No models, no files."""
