"""finsa's one entry point: compose, check, run a stage, return its objective.

    python run.py                                    the main job
    python run.py -m method=zero_shot,lora_response  a sweep
    python run.py stage=check model=qwen05b          the plan, without loading weights
    python run.py stage=list                         what there is to choose

Exit code 2: something the user can mend, told in one message. 1: a job of a sweep failed. 130: interrupted.
"""

import sys

from finsa.cli import run

if __name__ == "__main__":
    sys.exit(run())
