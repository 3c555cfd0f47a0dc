"""Judging a model by data sets on disk."""
