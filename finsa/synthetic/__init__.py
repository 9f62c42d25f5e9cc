"""Generation of the texts of the embedded default."""
