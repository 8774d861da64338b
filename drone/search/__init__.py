"""Ranks for a whole model."""
