"""Multi-token labels as a prefix tree that is scored in one forward pass.

Labels may share prefixes (看涨, 看跌). Their proper prefixes form a tree; in one pass over prompt and nodes, each
node attends only to the prompt and its ancestors, which gives every token's probability.

Letters: b rows of a batch, s tokens, m nodes of the label tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finsa.data.rows import Renderer

if TYPE_CHECKING:  # scoring with an ONNX graph needs no torch
    import torch

Answer = tuple[int, ...]


@dataclass(frozen=True)
class LabelTree:
    """Proper prefixes of the labels, as nodes after the prompt.

    Args:
        tokens: the token of each node, (m,).
        parents: its parent's position among root (0) and nodes (1..m), (m,).
        depths: 1 for a first token, (m,).
        steps: per label, (position read, token) for each of its tokens.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> LabelTree:
        """Build the tree of the answers' proper prefixes."""
        prefixes = sorted({answer[:n] for answer in answers for n in range(1, len(answer))}, key=lambda p: (len(p), p))
        position = {(): 0} | {prefix: number for number, prefix in enumerate(prefixes, start=1)}
        return cls(
            tokens=tuple(prefix[-1] for prefix in prefixes),
            parents=tuple(position[prefix[:-1]] for prefix in prefixes),
            depths=tuple(len(prefix) for prefix in prefixes),
            steps=tuple(tuple((position[a[:n]], a[n]) for n in range(len(a))) for a in answers),
        )

    @property
    def chain(self) -> bool:
        """Whether each node attends to all nodes before it, so that no mask is needed."""
        return self.parents == tuple(range(len(self.parents)))

    def ancestors(self) -> torch.Tensor:
        """Which nodes a node attends to, itself included: (m, m) booleans."""
        import torch

        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent > 0:
                sees[node] |= sees[parent - 1]
        return sees


def scored_answers(renderer: Renderer) -> tuple[list[Answer], str]:
    """The tokens that are scored for each label, and the name of the rule, which a run records.

    A label that is a prefix of another can never score below it, so in that case labels are scored with an end token.
    """
    answers = renderer.answers
    nested = any(a != b and b[: len(a)] == a for a in answers for b in answers)
    if nested:
        return [(*answer, renderer.end) for answer in answers], "whole label and end token"
    return list(answers), "whole label"


def tree_inputs(tree: LabelTree, lengths: torch.Tensor, s: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Attention mask (b, 1, s, s), additive, and positions (b, s) for prompts followed by tree nodes.

    Computed on the device of `lengths` without synchronization.
    """
    import torch

    from finsa.models import hardware

    device, m = lengths.device, len(tree.tokens)
    place = torch.arange(s, device=device)
    node = place - lengths[:, None]  # (b, s): index of the node at this position; outside 0..m-1: no node
    number = node.clamp(0, m - 1)
    is_node = (node >= 0) & (node < m)
    between = is_node[:, :, None] & is_node[:, None, :]
    related = hardware.to_device(tree.ancestors(), device)[number[:, :, None], number[:, None, :]]
    # Not torch.where, which ONNX Runtime does not have for booleans.
    sees = (between & related) | (~between & (place[:, None] >= place))
    depth = hardware.to_device(torch.tensor(tree.depths), device)[number]
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": torch.where(is_node, lengths[:, None] - 1 + depth, place)}


def after_cache(inputs: dict[str, torch.Tensor], before: int) -> dict[str, torch.Tensor]:
    """Mask and positions of rows after `before` cached tokens that all of them attend to."""
    import torch

    if not inputs:
        return {}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (before, 0))
    return {"attention_mask": mask, "position_ids": inputs["position_ids"] + before}
