"""Mixtures of experts over adapters."""
