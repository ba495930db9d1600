"""`--export-kd-cfg FILE.yaml`: the keys of ModelOpt's `DistillationConfig`, with its defaults.

Source of keys and meaning: ModelOpt 0.47, `modelopt/torch/distill/plugins/megatron.py`. Fixed weights take
the place of its balancer; `intermediate_loss_scale` is an own one.
"""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from post_training.errors import SetupError

_LAYER = re.compile(r"decoder\.(final_layernorm|layers\.(0|[1-9][0-9]{0,5}))")
_KEYS = (
    *("logit_layers", "intermediate_layer_pairs", "intermediate_loss_scale", "skip_lm_loss"),
    *("kd_loss_scale", "logit_kl_temperature", "logit_kl_topk"),
)


@dataclass(frozen=True)
class LayerPair:
    """Two layers whose outputs are compared at trained tokens."""

    student: str
    """Name of a module."""
    teacher: str
    loss: str
    """`cosine` or `mse`."""


@dataclass(frozen=True)
class KnowledgeSettings:
    """What is learned of a teacher, and with which weights."""

    skip_lm_loss: bool = True
    """Learn of the teacher only."""
    kd_loss_scale: float = 1.0
    """Weight of the teacher's part beside a cross-entropy of weight 1."""
    logit_kl_temperature: float = 1.0
    logit_kl_topk: int | None = None
    """Compare so many tokens of the teacher and the mass of the rest; None: all."""
    pairs: tuple[LayerPair, ...] = ()
    intermediate_loss_scale: float = 1.0
    """Weight of the mean over the pairs beside the divergence of logits."""


def knowledge_settings(args: argparse.Namespace) -> KnowledgeSettings | None:
    """Those of a run; None where no student is taught.

    Raises:
        SetupError: the file cannot be read, or asks for what cannot be done.
    """
    online = args.export_kd_teacher_load is not None
    if args.draft is not None or not (online or args.offline_distillation_data):
        return None
    file = args.export_kd_cfg
    if file is None:
        return KnowledgeSettings()
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SetupError(
            f"--export-kd-cfg {file}: cannot be read ({' '.join(str(error).split())})"
        ) from error
    try:
        settings = _settings(found if found is not None else {})
        _check(settings, args, online=online)
    except ValueError as error:
        raise SetupError(f"--export-kd-cfg {file}: {error}") from error
    return settings


def _settings(found: Any) -> KnowledgeSettings:
    if not isinstance(found, dict):
        raise ValueError("holds no keys and values")
    for key in found:
        if key in ("criterion", "loss_balancer"):
            raise ValueError(f"{key}: losses and their fixed weights are those of the other keys")
        if key not in _KEYS:
            raise ValueError(f"{key}: no such key; there are {', '.join(_KEYS)}")
    if found.get("logit_layers") not in (None, [], ["output_layer"] * 2):
        raise ValueError(
            f"logit_layers {found['logit_layers']}: the logits are those of [output_layer, output_layer]"
        )
    skip = found.get("skip_lm_loss", True)
    if not isinstance(skip, bool):
        raise ValueError(f"skip_lm_loss {skip}: must be true or false")
    if skip and "kd_loss_scale" in found:
        raise ValueError(
            f"kd_loss_scale {found['kd_loss_scale']}: weighs the teacher against the data, which "
            f"skip_lm_loss leaves out; set skip_lm_loss: false, or leave the scale out"
        )
    top = found.get("logit_kl_topk")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"logit_kl_topk {top}: must be a number of tokens, at least 1")
    listed = found.get("intermediate_layer_pairs")
    if listed is not None and not isinstance(listed, list):
        raise ValueError(f"intermediate_layer_pairs {listed}: must be a list of pairs")
    pairs = tuple(_pair(entry) for entry in listed or ())
    if not pairs and "intermediate_loss_scale" in found:
        raise ValueError("intermediate_loss_scale: there are no intermediate_layer_pairs")
    return KnowledgeSettings(
        skip,
        _positive(found, "kd_loss_scale"),
        _positive(found, "logit_kl_temperature", most=100.0),
        top,
        pairs,
        _positive(found, "intermediate_loss_scale"),
    )


def _positive(found: dict[str, Any], key: str, most: float = 1e6) -> float:
    value = found.get(key, 1.0)
    if isinstance(value, str):  # YAML takes 1e-3 for text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ValueError(f"{key} {value}: must be a number above 0 and at most {most:g}")
    return float(value)


def _pair(entry: Any) -> LayerPair:
    if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
        raise ValueError(
            f"intermediate_layer_pairs {entry}: must be [student's layer, teacher's layer] or "
            f"[student's layer, teacher's layer, cosine or mse]"
        )
    student, teacher, loss = (*entry, "cosine")[:3]
    if loss not in ("cosine", "mse"):
        raise ValueError(f"intermediate_layer_pairs {entry}: {loss} is neither cosine nor mse")
    for name in (student, teacher):
        if not _LAYER.fullmatch(str(name)):
            raise ValueError(
                f"intermediate_layer_pairs {entry}: {name} is no whole layer, which all kernels have: "
                f"decoder.final_layernorm, or decoder.layers.N from 0"
            )
    return LayerPair(student, teacher, loss)


def _check(settings: KnowledgeSettings, args: argparse.Namespace, *, online: bool) -> None:
    """Compare with the run.

    Raises:
        ValueError: the run cannot do it.
    """
    top = settings.logit_kl_topk
    vocabulary = args.vocab_size or args.padded_vocab_size
    if top is not None and vocabulary and top > vocabulary:
        raise ValueError(f"logit_kl_topk {top}: the vocabulary has {vocabulary} tokens")
    if not online:
        if settings.logit_kl_temperature != 1.0:
            raise ValueError(
                "logit_kl_temperature: stored probabilities are those of temperature 1"
            )
        if top is not None:
            raise ValueError("logit_kl_topk: is that of the stored features; leave it out")
        if settings.pairs:
            raise ValueError("intermediate_layer_pairs: no teacher is at hand; leave them out")
    for name in (name for pair in settings.pairs for name in (pair.student, pair.teacher)):
        if name == "decoder.final_layernorm":
            continue
        if args.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"intermediate_layer_pairs {name}: with pipeline parallelism the loss is on the last "
                f"stage, which has decoder.final_layernorm only for certain"
            )
        if args.recompute_granularity == "full":
            raise ValueError(
                f"intermediate_layer_pairs {name}: --recompute-granularity full computes layers "
                f"without gradients at first; use decoder.final_layernorm"
            )


def check_pairs(settings: KnowledgeSettings, args: argparse.Namespace, teacher: Any) -> None:
    """Compare the layers of both models, whose arguments these are.

    Raises:
        SetupError: one is not there, or the widths differ.
    """
    for pair in settings.pairs:
        given = f"--export-kd-cfg: intermediate_layer_pairs [{pair.student}, {pair.teacher}]"
        if args.hidden_size != teacher.hidden_size:
            raise SetupError(
                f"{given}: the student is {args.hidden_size} wide and the teacher {teacher.hidden_size}; "
                f"a projection between them would have to be trained and kept in checkpoints: compare "
                f"logits only, which need no width"
            )
        for name, model in ((pair.student, args), (pair.teacher, teacher)):
            match = _LAYER.fullmatch(name)
            if match and match[2] and int(match[2]) >= model.num_layers:
                raise SetupError(f"{given}: {name} is none of its {model.num_layers} layers")
