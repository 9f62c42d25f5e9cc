"""The board in the browser: commands that are composed there, their processes, and the runs in ``output_dir``."""
