"""Label scoring, prediction and export."""
