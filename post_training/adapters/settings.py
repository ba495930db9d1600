"""Which matrices of a model get low-rank factors: W + scaling * B A, with A [rank, in] and B [out, rank].

Matrices are those of the HuggingFace model, also where Megatron fuses some: a query projection has factors
of its own, and its name is PEFT's. Names and patterns mean what they mean there.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from post_training.errors import SetupError
from post_training.hf.check import expected_tensors
from post_training.hf.families import Weight, model_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEYWORDS = ("attention", "mlp", "all")
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
        return self.parameter.startswith("embedding.")

    @property
    def keys(self) -> tuple[str, str]:
        """What PEFT calls the two factors."""
        kind = "lora_embedding_{}" if self.is_embedding else "lora_{}.weight"
        return f"{self.name}.{kind.format('A')}", f"{self.name}.{kind.format('B')}"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of A and B; A of an embedding is [rank, vocabulary], B [hidden, rank]."""
        rows, columns = self.shape[::-1] if self.is_embedding else self.shape
        return (self.rank, columns), (rows, self.rank)

    def is_of(self, keyword: str) -> bool:
        """Whether one of `KEYWORDS` means it."""
        attention = ".self_attention." in self.parameter
        mlp = not attention and self.weight.layout in ("gate_up", "columns")
        attention = attention and self.weight.layout != "replicated"
        return {"attention": attention, "mlp": mlp, "all": attention or mlp}[keyword]


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

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> LoraSettings:
        """From what `facts` made."""
        names = facts["targets"]
        known = {key: facts[key] for key in cls.__dataclass_fields__}
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


def every_target(config: PretrainedConfig) -> dict[str, Target]:
    """All modules of a model that hold a weight, by name; those that can have no factors among them."""
    found = (
        Target(name.removesuffix(".weight"), parameter, weight, part)
        for parameter, weight in model_weights(config).items()
        for part, name in enumerate(weight.tensors)
        if name.endswith(".weight")
    )
    return {target.name: target for target in found}


def chosen_targets(config: PretrainedConfig, settings: LoraSettings) -> dict[str, Target]:
    """The matrices that get factors, by name, in the order of the model.

    Raises:
        SetupError: a name or the pattern matches nothing, or what can have no factors; or a rank is larger
            than its matrix.
    """
    every = every_target(config)
    names = dict.fromkeys(_matching(every, settings.targets))
    chosen = {name: settings.sized(every[name]) for name in every if name in names}
    for name, target in chosen.items():
        if target.weight.layout == "replicated":
            what = "the router" if len(target.weight.tensors[f"{name}.weight"]) == 2 else "the norm"
            raise SetupError(
                f"{FLAG}: {_shown(settings.targets)} matches {what} {name}, which gets no factors; name "
                f"matrices more exactly"
            )
        if target.weight.layout == "vocabulary" and config.tie_word_embeddings:
            raise SetupError(
                f"{FLAG}: {name} is embedding and output layer in one (tie_word_embeddings): factors of "
                f"one use could not be merged; leave it out"
            )
        if target.rank > min(target.shape):
            raise SetupError(
                f"--lora-rank {target.rank}: {name} has shape {list(target.shape)}; the rank must be at "
                f"most {min(target.shape)}"
            )
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
            known = dict.fromkeys(n.rpartition(".")[2] for n, t in every.items() if t.is_of("all"))
            raise SetupError(
                f"{FLAG} {word}: matches no matrix; there are {', '.join(known)}, embed_tokens and "
                f"lm_head, the words {', '.join(KEYWORDS)}, and patterns for whole names such as "
                f"{next(name for name, t in every.items() if t.is_of('all'))}"
            )
        yield from found


def _shown(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else " ".join(targets)


def short_names(config: PretrainedConfig, chosen: Iterable[str]) -> list[str]:
    """The fewest names that mean just these modules: last parts, where that is all of that name."""
    chosen = set(chosen)
    last = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in every_target(config) if name.rpartition(".")[2] in last}
    return sorted(last if meant == chosen else chosen)


def trained_parameters(targets: Iterable[Target]) -> int:
    """Elements of all factors."""
    return sum(math.prod(shape) for target in targets for shape in target.shapes)


def describe_adapter(args: argparse.Namespace) -> str | None:
    """What gets factors, by name and shape, and the share that is trained; None without `--lora-rank`."""
    if args.lora is None:
        return None
    targets = chosen_targets(args.hf_config, args.lora).values()
    kinds = Counter((t.name.rpartition(".")[2], t.shape, t.rank, t.scaling) for t in targets)
    lines = [
        f"  {name} {list(shape)} x {count}: rank {rank}, scaling {scaling:g}"
        for (name, shape, rank, scaling), count in kinds.items()
    ]
    trained = trained_parameters(targets)
    whole = sum(math.prod(shape) for shape in expected_tensors(args.hf_config).values())
    share = trained / (whole + trained)
    return "\n".join(
        [f"LoRA: {trained:,} of {whole + trained:,} parameters are trained ({share:.2%})", *lines]
    )
