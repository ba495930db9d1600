"""Which matrices of a model get low-rank factors: W + scaling * B A, with A [rank, in] and B [out, rank].

Matrices are those of the HuggingFace model, also where Megatron fuses some: a query projection has factors
of its own, and its name is PEFT's. Names and patterns mean what they mean there. What a model of
`transformers` has is looked up in it (`modules.py`); fused experts have one pair of factors a parameter.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from post_training.adapters.modules import Module, modules_of, parameters_of
from post_training.errors import SetupError
from post_training.hf.check import expected_tensors
from post_training.hf.families import model_weights
from post_training.tensors.weight import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEYWORDS = ("attention", "mlp", "all", "vision")
FLAG = "--lora-targets"


@dataclass(frozen=True)
class Target:
    """One matrix, and the factors beside it."""

    name: str
    """Of the HuggingFace module, such as `model.layers.0.self_attn.q_proj`."""
    parameter: str
    """Of the Megatron parameter that holds the matrix, in a whole model."""
    weight: Weight
    """What makes up that parameter."""
    part: int
    """Which of its tensors this one is."""
    kind: str
    """`attention`, `mlp`, `vision`, `embedding`, `output`; `tied`, `router`, `norm`, `layer` have none."""
    module: Module | None = None
    """Of `transformers`, where Megatron has no part in it."""
    holder: str = ""
    """What PEFT calls the module that holds its factors, where that is not its name."""
    rank: int = 0
    scaling: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.weight.tensors[f"{self.name}.weight"]
        return rows, columns

    @property
    def is_embedding(self) -> bool:
        """Whether its input is tokens."""
        return self.kind == "embedding"

    @property
    def fused(self) -> int:
        """Experts whose matrices lie in this parameter; 0: it is one matrix."""
        return 0 if self.module is None else self.module.experts

    @property
    def keys(self) -> tuple[str, str]:
        """What PEFT calls the two factors."""
        kind = "lora_embedding_{}" if self.is_embedding else "lora_{}.weight"
        holder = self.holder or self.name
        return f"{holder}.{kind.format('A')}", f"{holder}.{kind.format('B')}"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of A and B; A of an embedding is [rank, vocabulary], B [hidden, rank]."""
        rows, columns = self.shape[::-1] if self.is_embedding else self.shape
        rank = self.rank * max(1, self.fused)
        return (rank, columns), (rows, rank)

    def is_of(self, keyword: str) -> bool:
        """Whether one of `KEYWORDS` means it."""
        return self.kind in (("attention", "mlp") if keyword == "all" else (keyword,))


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is, beside the model that it is of."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    """Last parts of names, and `KEYWORDS`; or one pattern for whole names."""
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks, by patterns for the end of names."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    backend: str = "megatron"
    """Whose matrices it is beside: `megatron` or `transformers`."""
    nf4: bool = False
    """Whether these are kept in 4 bits."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> LoraSettings:
        """From what `facts` made."""
        names = facts["targets"]
        known = {key: facts[key] for key in cls.__dataclass_fields__ if key in facts}
        return cls(**known | {"targets": names if isinstance(names, str) else tuple(names)})

    def facts(self) -> dict[str, Any]:
        """In the types of JSON."""
        found = asdict(self)
        return found if isinstance(self.targets, str) else found | {"targets": list(self.targets)}

    def sized(self, target: Target) -> Target:
        """A target with its rank and scaling."""

        def by_pattern(pattern: Mapping[str, Any], otherwise: Any) -> Any:
            found = (v for k, v in pattern.items() if re.fullmatch(rf"(.*\.)?({k})", target.name))
            return next(found, otherwise)

        rank = int(by_pattern(self.rank_pattern, self.rank))
        alpha = float(by_pattern(self.alpha_pattern, self.alpha))
        scaling = alpha / (math.sqrt(rank) if self.rslora else rank)
        return replace(target, rank=rank, scaling=scaling)


def every_target(config: PretrainedConfig, backend: str = "megatron") -> dict[str, Target]:
    """All modules of a model that hold a weight, by name; those that can have no factors among them."""
    if backend == "transformers":
        found: Iterable[Target] = (
            Target(
                *(name, "", Weight("columns", {f"{name}.weight": module.shape}), 0),
                *(module.kind, module),
            )
            for name, module in modules_of(config).items()
        )
        return {target.name: target for target in found}
    found = (
        Target(
            name.removesuffix(".weight"), parameter, weight, part, _kind(config, parameter, weight)
        )
        for parameter, weight in model_weights(config).items()
        for part, (name, shape) in enumerate(weight.tensors.items())
        if name.endswith(".weight") or (weight.of_expert and len(shape) == 3)
    )
    return {target.name: target for target in found}


def _kind(config: PretrainedConfig, parameter: str, weight: Weight) -> str:
    """Of a parameter of Megatron's."""
    if weight.layout == "vocabulary":
        kind = "embedding" if parameter.startswith("embedding.") else "output"
        return "tied" if config.tie_word_embeddings else kind
    if weight.layout == "replicated":
        return "router" if len(next(iter(weight.tensors.values()))) == 2 else "norm"
    return "attention" if ".self_attention." in parameter else "mlp"


def chosen_targets(config: PretrainedConfig, settings: LoraSettings) -> dict[str, Target]:
    """The matrices that get factors, by name, in the order of the model.

    Raises:
        SetupError: a name or the pattern matches nothing, or what can have no factors; or a rank is larger
            than its matrix; or Megatron holds its rows in another order.
    """
    every = every_target(config, settings.backend)
    names = dict.fromkeys(_matching(every, settings.targets))
    chosen = {name: settings.sized(every[name]) for name in every if name in names}
    for name, target in chosen.items():
        if target.kind in ("router", "norm", "layer"):
            raise SetupError(
                f"{FLAG}: {_shown(settings.targets)} matches the {target.kind} {name}, which gets no "
                f"factors; name matrices more exactly"
            )
        if target.kind == "tied":
            raise SetupError(
                f"{FLAG}: {name} is embedding and output layer in one (tie_word_embeddings): factors of "
                f"one use could not be merged; leave it out"
            )
        if target.weight.sections:
            raise SetupError(
                f"{FLAG}: {name} is one tensor of several matrices, which Megatron's layers hold in "
                f"another order; leave it out, or add --model-backend transformers"
            )
        if target.module is None and f"{name}.weight" not in target.weight.tensors:
            raise SetupError(
                f"{FLAG}: {_shown(settings.targets)} matches {name}, the experts' matrices in one tensor, "
                f"which get no factors beside Megatron's layers; name others, such as attention, or add "
                f"--model-backend transformers"
            )
        if target.rank > min(target.shape):
            raise SetupError(
                f"--lora-rank {target.rank}: {name} has shape {list(target.shape)}; the rank must be at "
                f"most {min(target.shape)}"
            )
    # Several parameters of one module are wrapped one after the other.
    around: Counter[str] = Counter()
    for name, target in reversed(chosen.items()):
        if target.fused:
            module = name.rpartition(".")[0]
            chosen[name] = replace(target, holder=module + ".base_layer" * around[module])
            around[module] += 1
    return chosen


def _matching(every: Mapping[str, Target], targets: tuple[str, ...] | str) -> Iterator[str]:
    """Names of what is meant.

    Raises:
        SetupError: a part of it means nothing.
    """
    for word in (targets,) if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            found = [name for name in every if re.fullmatch(word, name)]
        elif word in KEYWORDS:
            found = [name for name, target in every.items() if target.is_of(word)]
        else:
            found = [name for name in every if f".{name}".endswith(f".{word}")]
        if not found:
            named = [
                n for n, t in every.items() if t.kind in ("attention", "mlp", "embedding", "output")
            ]
            known = dict.fromkeys(name.rpartition(".")[2] for name in named)
            raise SetupError(
                f"{FLAG} {word}: matches no matrix; there are {', '.join(known)}, the words "
                f"{', '.join(KEYWORDS)}, and patterns for whole names such as {named[-1]}"
            )
        # A tower that sees is meant where its name is written, or where nothing else is.
        towers = {name: t.module.tower for name, t in every.items() if t.module and t.module.tower}
        yield from [n for n in found if n not in towers or towers[n] in word] or found


def _shown(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else " ".join(targets)


def short_names(every: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """The fewest names that mean just these modules: last parts, where that is all of that name."""
    chosen = set(chosen)
    last = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in every if name.rpartition(".")[2] in last}
    # A number is what blocks are called, too.
    exact = meant == chosen and not any(name.isdigit() for name in last)
    return sorted(last if exact else chosen)


def trained_parameters(targets: Iterable[Target]) -> int:
    """Elements of all factors."""
    return sum(math.prod(shape) for target in targets for shape in target.shapes)


def describe_adapter(args: argparse.Namespace) -> str | None:
    """What gets factors, by name and shape, and the share that is trained; None without `--lora-rank`."""
    if args.lora is None:
        return None
    targets = chosen_targets(args.hf_config, args.lora).values()
    kinds: Counter[Any] = Counter()
    for t in targets:
        kinds[t.name.rpartition(".")[2], t.shape, t.rank, t.scaling] += max(1, t.fused)
    lines = [
        f"  {name} {list(shape)} x {count}: rank {rank}, scaling {scaling:g}"
        for (name, shape, rank, scaling), count in kinds.items()
    ]
    trained = trained_parameters(targets)
    if args.lora.backend == "transformers":
        whole = parameters_of(args.hf_config)
    else:
        whole = sum(math.prod(shape) for shape in expected_tensors(args.hf_config).values())
    share = trained / (whole + trained)
    return "\n".join(
        [f"LoRA: {trained:,} of {whole + trained:,} parameters are trained ({share:.2%})", *lines]
    )
