"""Sources, splits, sampling, prompts and rows: everything before the first tensor."""
