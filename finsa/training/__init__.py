"""Collation, the trainer and its progress."""
