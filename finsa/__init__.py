"""finsa: declarative experiments for fine-tuning language models on financial text."""

__version__ = "0.1.0"
