"""Imports of tests/commands.py before a command starts; commands do not change any state seen by others."""

# ruff: noqa: F401
import gc

from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

import finsa.cli
from finsa.baselines import linear, neural
from finsa.evaluation import figures, report, run_results
from finsa.inference import predictor
from finsa.stages import chain, check, evaluate, moe_joint, predict, search, train

gc.freeze()  # a command's garbage collections leave out the objects of these modules
