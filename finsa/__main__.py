"""``python -m finsa``, where there is no checkout with a run.py in it."""

import sys

from finsa.cli import run

if __name__ == "__main__":
    sys.exit(run())
