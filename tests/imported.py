"""Imports of tests/commands.py before a command starts; commands do not change any state seen by others."""

# ruff: noqa: F401
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

import finsa.cli
from finsa.baselines import linear, neural
from finsa.evaluation import figures, report, run_results
from finsa.inference import predictor
from finsa.stages import chain, check, evaluate, moe_joint, predict, search, train
