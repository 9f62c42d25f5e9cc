"""Predictions over HTTP: requests in, batched answers out, and a page. No torch here: the stage brings the model."""
