"""The entry point of finsa: compose a configuration, check it, run a stage.

    python run.py                                    the main job
    python run.py -m method=zero_shot,lora_response  a sweep
    python run.py stage=check model=qwen05b          the plan, without loading weights
    python run.py stage=list                         what there is to choose

Exit codes: 1 if a job of a sweep failed, or for a bug in finsa; 2 for an error that the user can fix, reported in one
message; 130 if interrupted; 143 if terminated.
"""

import sys

from finsa.cli import run

if __name__ == "__main__":
    sys.exit(run())
