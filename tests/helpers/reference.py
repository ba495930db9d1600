"""The truth that runs are compared with: a HuggingFace model in a plain PyTorch loop.

One process, fp32, no packing: each document alone. The loss of a global batch is weighted by token;
AdamW with Megatron's hyper-parameters; gradient norm and clipping in float64.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data import SFTDataset, prepare_documents
from tests.helpers.models import FAMILIES, load_model, make_tokenizer
from tests.helpers.rows import Row, tokens_and_mask

CLOSE = 1e-4
"""Logits differ by less between layouts, also after ten steps of Adam."""


def document_losses(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Losses of the trained tokens of one document, seen alone: float32 [trained tokens]."""
    return losses_and_routing(model, ids, mask)[0]


@dataclass
class Right:
    """Trained tokens that are the most probable ones."""

    tokens: int = 0
    close: int = 0
    """Tokens for which another one is, or is not, by less than rounding may move a logit."""

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Add tokens: logits float32 [tokens, vocabulary], labels int64 [tokens]."""
        self.tokens += int((logits.argmax(-1) == labels).sum())
        own = logits.gather(1, labels.unsqueeze(1))
        others = logits.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1, keepdim=True)
        self.close += int(((own - others).abs() < CLOSE).sum())


def losses_and_routing(
    model: Any, ids: Tensor, mask: Tensor, right: Right | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The same, and the router's probabilities in each layer with experts: float32 [tokens, experts].

    `right` counts the trained tokens.
    """
    routed = model.config.model_type in FAMILIES and hasattr(model.config, "num_experts")
    options = {"output_router_logits": True} if routed else {}
    out = model(input_ids=ids.unsqueeze(0), use_cache=False, **options)
    chosen = torch.nonzero(mask[1:]).flatten()
    logits = out.logits[0, :-1][chosen]
    losses = F.cross_entropy(logits.float(), ids[1:][chosen], reduction="none")
    if right is not None:
        right.count(logits.detach().float(), ids[1:][chosen])
    return losses, [
        layer.float().softmax(-1) for layer in getattr(out, "router_logits", None) or ()
    ]


def choices(probabilities: Tensor, top_k: int) -> Tensor:
    """How many of a document's tokens choose each expert: float32 [experts]."""
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=probabilities.shape[1]).float()


def imbalance(probabilities: Tensor, top_k: int) -> Tensor:
    """The load balancing loss of one document in one layer (Switch Transformer): scalar, 1 if even."""
    tokens, experts = probabilities.shape
    shares = choices(probabilities, top_k) / (tokens * top_k)
    return experts * (shares * probabilities.mean(0)).sum()


def mean_loss(model: Any, rows: Iterable[Row]) -> tuple[float, int]:
    """Token-weighted mean loss over rows, and the number of trained tokens."""
    return evaluate(model, rows)[:2]


def evaluate(model: Any, rows: Iterable[Row]) -> tuple[float, int, Right]:
    """The same, and how many of these tokens are the most probable ones."""
    tokenizer = make_tokenizer()
    total, tokens, right = 0.0, 0, Right()
    with torch.no_grad():
        for row in rows:
            losses, _ = losses_and_routing(model, *tokens_and_mask(row, tokenizer), right)
            total += losses.double().sum().item()
            tokens += losses.numel()
    return total / tokens, tokens, right


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run, as flags and for the reference."""

    optimizer: str = "adam"
    packing: Literal["best-fit", "none"] = "best-fit"
    steps: int = 10
    global_batch: int = 4
    seq_length: int = 192
    lr: float = 2e-3
    min_lr: float = 0.0
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1234
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    balance: float = 0.0

    def flags(self) -> list[str]:
        """The same for `finetune.py`."""
        return [
            *("--train-iters", str(self.steps), "--global-batch-size", str(self.global_batch)),
            *("--seq-length", str(self.seq_length), "--lr", str(self.lr)),
            *("--min-lr", str(self.min_lr), "--weight-decay", str(self.weight_decay)),
            *("--clip-grad", str(self.clip), "--seed", str(self.seed)),
            *("--optimizer", self.optimizer, "--packing", self.packing),
            *(("--moe-aux-loss-coeff", str(self.balance)) if self.balance else ()),
        ]

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The same optimizer for the reference: matrices decay, vectors do not."""
        every = list(parameters)
        decayed = [p for p in every if p.dim() > 1 and not getattr(p, "is_bias", False)]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": [p for p in every if all(p is not d for d in decayed)], "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)

    def learning_rate(self, steps_done: int) -> float:
        """Megatron's cosine over the whole run, without warm-up."""
        ratio = steps_done / self.steps
        return self.min_lr + 0.5 * (math.cos(math.pi * ratio) + 1.0) * (self.lr - self.min_lr)


@dataclass
class Trajectory:
    """What a run computed."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    right: list[Right] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    """Mean over trained tokens and layers of the load balancing loss of the token's document."""
    expert_tokens: list[Tensor] = field(default_factory=list)
    """Tokens of documents by expert in each step: float32 [layers with experts, experts]."""
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)


def batches(rows: Sequence[Row], data_file: Path, recipe: Recipe) -> list[list[int]]:
    """Rows of each global batch: only their grouping is taken from the packing plan."""
    tokenizer = make_tokenizer()
    documents = prepare_documents(
        files=[str(data_file)],
        tokenizer=tokenizer,
        seq_length=recipe.seq_length,
        cache_dir=None,
        on_bad_row="error",
    )
    assert len(documents) == len(rows), "every row of the test data fits into a pack"
    dataset = SFTDataset(
        recipe.steps * recipe.global_batch,
        documents,
        tokenizer,
        recipe.seq_length,
        seed=recipe.seed,
        packing=recipe.packing,
        global_batch_size=recipe.global_batch,
    )
    result = []
    for step in range(recipe.steps):
        packs = range(step * recipe.global_batch, (step + 1) * recipe.global_batch)
        result.append([int(row) for pack in packs for row in dataset.document_indices(pack)])
    return result


def train(
    folder: Path,
    rows: Sequence[Row],
    data_file: Path,
    recipe: Recipe,
    adapt: Callable[[Any], dict[str, Tensor]] | None = None,
) -> Trajectory:
    """Train the HuggingFace model of `folder` on `rows`.

    `adapt` changes the model and gives what is trained of it, by name: start and end hold that only.
    """
    tokenizer = make_tokenizer()
    # A document ends with a separator, never trained, which has a part in the balance of experts only.
    end = (torch.tensor([tokenizer.convert_tokens_to_ids("<|endoftext|>")]), torch.tensor([0]))
    examples = [
        (torch.cat([ids, end[0]]), torch.cat([mask, end[1]]))
        for ids, mask in (tokens_and_mask(row, tokenizer) for row in rows)
    ]
    model: Any = load_model(folder).train()
    # The separator is the padding token, whose embedding transformers would not train.
    model.get_input_embeddings().padding_idx = None
    named = dict(model.named_parameters()) if adapt is None else adapt(model)

    def tensors() -> dict[str, Tensor]:
        if adapt is None:
            return saved_tensors(model)
        return {name: value.detach().clone() for name, value in named.items()}

    result = Trajectory(start=tensors())
    for name, tensor in named.items():
        # One tensor may hold the biases of all experts.
        setattr(tensor, "is_bias", name.endswith("bias"))  # noqa: B010
    optimizer = recipe.make_optimizer(named.values())
    for step, batch in enumerate(batches(rows, data_file, recipe)):
        tokens = sum(int(examples[row][1][1:].sum()) for row in batch)
        total, balance, experts, right = 0.0, 0.0, torch.zeros(()), Right()
        for row in batch:
            losses, routing = losses_and_routing(model, *examples[row], right)
            objective = losses.sum()
            if routing:
                top_k: int = model.config.num_experts_per_tok
                layers = torch.stack([imbalance(layer, top_k) for layer in routing])
                # A document weighs as much as its trained tokens do in the loss.
                objective = objective + recipe.balance * losses.numel() * layers.sum()
                balance += losses.numel() * layers.detach().double().mean().item()
                experts = experts + torch.stack([choices(layer, top_k) for layer in routing])
            (objective / tokens).backward()
            total += losses.detach().double().sum().item()
        gradients = [p.grad for p in named.values() if p.grad is not None]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        scale = min(1.0, recipe.clip / (norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(total / tokens)
        result.grad_norms.append(norm)
        result.trained_tokens.append(tokens)
        result.right.append(right)
        result.balance.append(balance / tokens)
        result.expert_tokens.append(experts)
    result.end = tensors()
    return result


def saved_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a model under the names that its files give them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


def update_error(found: dict[str, Tensor], expected: Trajectory) -> float:
    """Relative L2 distance of the whole update (final minus initial weights) from the reference's."""
    wrong, right = 0.0, 0.0
    for name, end in expected.end.items():
        wrong += (found[name] - end).double().square().sum().item()
        right += (end - expected.start[name]).double().square().sum().item()
    return math.sqrt(wrong / right)


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference of two lists of numbers."""
    assert len(found) == len(expected), (found, expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
