"""Run folders: files, locks, progress, provenance, and trackers."""
