"""A step on pairs of labels against trl's DPOTrainer, and exact against sampled policy gradients.

    python benchmarks/preferences.py            SmolLM2-135M from models/, or the embedded model (minutes)
    python benchmarks/preferences.py --quick    the embedded model, few rows, to see that it runs

Held equal: weights, LoRA, prompts, labels and batch of one micro-batch; no padding is counted as work. The arms take
turns; medians of CPU seconds. trl reads the prompt with the chosen and with the rejected label, once more by the
reference model as shipped, or not with reference log-probabilities that were computed before. finsa reads the prompt
once and takes both labels from it. Losses and gradients are equal (tests/training/test_objective_pairs.py).

The second table compares the gradient of the expected reward with estimates from g sampled labels per prompt, as GRPO
makes them (advantages centered on their group, divided by its standard deviation as shipped): the norm of an
estimate's deviation from its mean over the norm of the exact gradient, for the LoRA matrices of the same batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import torch
from datasets import Dataset as HubDataset
from rich.table import Table
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from finsa.config import ROOT, compose
from finsa.data import dataset, tokenized
from finsa.evaluation import tables
from finsa.models import adapters, base, tokenizers
from finsa.training import objective
from finsa.training.batches import Collator

GROUPS = (4, 8, 16)
DRAWS = 12  # estimates per kind and group


def main() -> None:
    """Measure both tables and write ``results/preferences.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded model and few rows; nothing is kept")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    rows, turns = (4, 1) if given.quick else (given.rows, given.turns)
    real = not given.quick and (ROOT / "models" / "smollm2_135m").is_dir()
    model = ["model=smollm2_135m", f"model.path={ROOT / 'models' / 'smollm2_135m'}"] if real else []
    words = ["method=dpo", "method.init=base", "method.adapter.dropout=0", "model.dtype=float32", *model]
    cfg = compose.build(*compose.compose_values(words), words)
    torch.set_num_threads(1)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    data = tokenized.build(cfg, dataset.load(cfg.data), tokenizer)
    prompts, gold = data.prompts("train"), data.gold("train")[:rows]
    wrong = [(label + 1) % 3 for label in gold]
    backbone = base.load_base(cfg.model, cfg.seed, "none")
    assert cfg.method.adapter is not None
    policy: Any = adapters.attach(backbone, cfg.model, cfg.method.adapter, cfg.seed)
    with torch.no_grad():  # B is zero at the start, and A would have no gradient
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    goal = objective.build(cfg.method, data.renderer, [1, 1, 1])
    scores = objective.label_word_log_probs(objective.LabelTree.of(data.renderer.answers))
    batch = Collator(0, goal.suffix)(
        [
            {**data.renderer.row(prompts[row], gold[row], "label"), "rejected": wrong[row], "reference": [-1.0] * 3}
            for row in range(rows)
        ]
    )
    answers = data.renderer.answers
    pairs = DataCollatorForPreference(pad_token_id=0)(
        [
            {
                "prompt_ids": prompts[row],
                "chosen_ids": list(answers[gold[row]]),
                "rejected_ids": list(answers[wrong[row]]),
            }
            for row in range(rows)
        ]
    )

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, use_cpu=True, bf16=False, report_to="none")
        lines = HubDataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        trainer = DPOTrainer(policy, args=args, train_dataset=lines, processing_class=tokenizer)
        policy.base_model.model.gradient_checkpointing_disable()  # trl enables it; with it, a step takes longer
        known = {"ref_chosen_logps": torch.zeros(rows), "ref_rejected_logps": torch.zeros(rows)}

        def stock(reference: dict[str, torch.Tensor]) -> torch.Tensor:
            trainer.precompute_ref_logps = bool(reference)
            loss: torch.Tensor = trainer._compute_loss(policy, {**pairs, **reference}, False)
            return loss

        arms: dict[str, Callable[[], torch.Tensor]] = {
            "trl DPOTrainer": lambda: stock({}),
            "trl DPOTrainer, reference log-probabilities computed before": lambda: stock(known),
            "finsa dpo": lambda: goal.total(policy, batch) / rows,
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        policy.train()
        for turn in range(turns + 1):  # the first one is not counted
            for name, loss in arms.items():
                policy.zero_grad()
                start = time.process_time()
                loss().backward()  # type: ignore[no-untyped-call]
                if turn:
                    seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    own = medians["finsa dpo"]
    table = Table("forward and backward of a micro-batch", "CPU s", "times finsa's", title=f"{rows} pairs")
    for name, value in medians.items():
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        table.add_row(name, f"{value:.2f} ({spread})", f"{value / own:.2f}")
    tables.show(table)

    # The gradient with respect to the label scores is exact or sampled; the same backward pass takes both to the
    # matrices, so the deviation of an estimate is that of its scores' gradient, taken through the network.
    log_probs = scores(policy, batch)
    p, targets = log_probs.detach().softmax(dim=1), batch["targets"]

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def through(slopes: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(log_probs, trained, slopes / rows, retain_graph=True)
        return torch.cat([one.flatten() for one in found])

    received = torch.eye(3)[targets]
    exact = through(-p * (received - (p * received).sum(dim=1, keepdim=True)))
    draw = torch.Generator().manual_seed(0)
    deviations: dict[str, dict[int, float]] = {"centered": {}, "as shipped (divided by the deviation)": {}}
    for group in GROUPS[:1] if given.quick else GROUPS:
        for kind, found in deviations.items():
            estimates = []
            for _ in range(2 if given.quick else DRAWS):
                sampled = torch.multinomial(p, group, replacement=True, generator=draw)
                reward = received.gather(1, sampled)
                advantage = reward - reward.mean(dim=1, keepdim=True)
                if kind != "centered":
                    advantage = advantage / (reward.std(dim=1, keepdim=True) + 1e-4)
                slopes = (advantage[:, :, None] * (torch.eye(3)[sampled] - p[:, None])).mean(dim=1)
                estimates.append(through(-slopes))
            stacked = torch.stack(estimates)
            found[group] = float((stacked - stacked.mean(dim=0)).norm(dim=1).mean() / stacked.mean(dim=0).norm())
    table = Table("samples per prompt", *deviations, title="deviation of a sampled gradient, in norms of its mean")
    for group in deviations["centered"]:
        table.add_row(str(group), *(f"{found[group]:.2f}" for found in deviations.values()))
    tables.show(table)
    print(f"norm of the exact gradient: {float(exact.norm()):.4g}; its deviation is 0")
    if not given.quick:
        report = {
            "model": cfg.model.name,
            "rows": rows,
            "seconds": seconds,
            "medians": medians,
            "deviations": deviations,
        }
        print(f"kept: {kept.write('preferences', report)}")


if __name__ == "__main__":
    main()
