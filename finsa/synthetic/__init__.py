"""The generator behind the embedded default."""
