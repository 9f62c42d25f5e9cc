"""Imports of tests/commands.py before a command starts; commands do not change any state seen by others."""

# ruff: noqa: F401
import gc

from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from trl import SFTTrainer

import finsa.cli
from finsa.baselines import linear, neural
from finsa.evaluation import figures, report, run_results
from finsa.inference import predictor
from finsa.stages import chain, check, evaluate, moe_joint, predict, search, train

get_checkpoint_conversion_mapping("qwen2")  # transformers compiles its patterns at the first call
gc.freeze()  # a command's garbage collections leave out the objects of these modules
