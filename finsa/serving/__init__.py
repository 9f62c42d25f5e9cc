"""Predictions over HTTP, with dynamic batching and a web page. Does not import torch: the stage provides the model."""
