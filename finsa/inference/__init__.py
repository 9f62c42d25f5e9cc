"""Label scores."""
