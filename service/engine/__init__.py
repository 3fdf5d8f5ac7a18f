"""Continuous batching over a paged memory cache."""
