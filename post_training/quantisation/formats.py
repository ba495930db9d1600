"""ModelOpt's quantisation formats: which are trained here, and written so that a reader computes the same.

A run can be quantised by what is equal on every layout and can be exported:

    weights   scaled by their largest value, one scale a matrix, an output channel, or a block of inputs
    inputs    as they are, or of a matrix one scale, its largest value in calibration

Source of the keys: ModelOpt 0.47, `modelopt/torch/quantization/config.py`.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from post_training.errors import SetupError
from post_training.hf.families import model_weights
from post_training.layout.pipeline import virtual_stages

FLAG = "--export-quant-cfg"
CALIBRATED = 512
FP8 = (4, 3)
# Megatron's layers that cut the inputs of a matrix over tensor parallel ranks, and the sizes of these.
_CUT_INPUTS = {"attention": "linear_proj", "mlp": "linear_fc2"}
# Megatron's local layers hold these matrices, of which each family has some.
_ATTENTION = "qkv proj q_proj q_down_proj q_up_proj kv_down_proj kv_up_proj"
_MATRICES = (
    *(f"self_attention.linear_{name}" for name in _ATTENTION.split()),
    *(
        f"mlp.{part}linear_{name}"
        for part in ("", "shared_experts.", "experts.local_experts.0.")
        for name in ("fc1", "fc2")
    ),
)
# Of a quantiser, what an export holds; all else is as ModelOpt has it.
_ATTRIBUTES = ("num_bits", "axis", "type", "block_sizes")
_WITHOUT = (
    ("model_backend", "megatron", "ModelOpt quantises Megatron's layers here"),
    ("transformer_impl", "local", "only the local layers are quantised"),
    ("use_torch_fsdp2", False, "scales would be cut like weights"),
    ("context_parallel_size", 1, "scales are not compared over it"),
    ("lora", None, "factors lie beside matrices that are not quantised"),
    ("draft", None, "a draft is trained beside a base as it is served"),
    ("fp8", None, "that is another way to compute in 8 bits"),
    ("random_weights", False, "there is nothing to calibrate"),
)


@dataclass(frozen=True)
class Quantisation:
    """What a run's model is quantised by."""

    name: str
    """As it was given: of ModelOpt's configuration, or of a file."""
    config: Mapping[str, Any]
    """ModelOpt's `quant_cfg` and `algorithm`."""
    weight_bits: int | tuple[int, int]
    """A number of bits, or exponent and mantissa."""
    input_bits: int | tuple[int, int] | None
    """None: inputs are as they are."""
    block: int | None
    """Inputs that share a scale of the weights."""

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it, in the types of JSON."""
        return {
            "weights": self.weight_bits,
            "inputs": self.input_bits,
            "block": self.block,
            "config": copy.deepcopy(dict(self.config)),
        }


def add_quantisation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    add = parser.add_argument_group("quantisation-aware training").add_argument
    add(
        FLAG,
        metavar="NAME|FILE",
        help="quantise the model before the first step and train it so: the name of a configuration of "
        "ModelOpt, such as FP8_DEFAULT_CFG, or a YAML file with its keys quant_cfg and algorithm",
    )
    add(
        "--calib-size",
        type=int,
        default=CALIBRATED,
        metavar="N",
        help="documents that inputs are measured on, in whole global batches "
        f"(default: {CALIBRATED})",
    )
    add(
        "--calib-dataset",
        nargs="+",
        metavar="FILE",
        help="files of these documents (default: the training data)",
    )


def quantisation_of(args: argparse.Namespace) -> Quantisation | None:
    """What the run's model is quantised by; None where it is not.

    Raises:
        SetupError: a missing or contradictory flag, or a format that is not equal on this layout or that
            no export could hold.
    """
    name = args.export_quant_cfg
    if name is None:
        for flag, usual in (("--calib-dataset", None), ("--calib-size", CALIBRATED)):
            if getattr(args, flag[2:].replace("-", "_")) != usual:
                raise SetupError(f"{flag}: nothing is quantised; add {FLAG}")
        return None
    for other, allowed, why in _WITHOUT:
        value = getattr(args, other, allowed)
        if value != allowed:
            said = "--lora-rank" if other == "lora" else f"--{other.replace('_', '-')} {value}"
            raise SetupError(f"{said}: not with {FLAG}: {why}")
    if virtual_stages(args) > 1:
        raise SetupError(
            f"{FLAG}: ModelOpt converts one part of a model a rank; leave virtual pipeline stages out"
        )
    if args.eval_only:
        raise SetupError(
            f"{FLAG}: --eval-only changes no model; a quantised checkpoint says it itself"
        )
    config = _read(name)
    found = Quantisation(name, config, *_checked(name, config))
    if args.hf_config is not None:
        _check_patterns(args, found)
    if found.input_bits is not None and args.num_experts is not None:
        raise SetupError(
            f"{FLAG} {name}: transformers holds all experts of a layer in one tensor, so that an export "
            f"with rounded inputs cannot be compared; quantise weights only, as INT8_WEIGHT_ONLY_CFG does"
        )
    if found.block is not None:
        _check_blocks(args, found.block)
    return found


def _read(name: str) -> dict[str, Any]:
    """The configuration of that name, or in that file."""
    if name.endswith((".yaml", ".yml", ".json")):
        try:
            found = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise SetupError(f"{FLAG} {name}: {reason}") from error
        if not isinstance(found, dict) or not isinstance(found.get("quant_cfg"), list):
            raise SetupError(f"{FLAG} {name}: expected keys quant_cfg, a list, and algorithm")
        return found
    import modelopt.torch.quantization as mtq

    known = sorted(key for key in vars(mtq) if key.endswith("_CFG"))
    if name not in known:
        raise SetupError(
            f"{FLAG} {name}: ModelOpt has no such configuration; those trained here are "
            f"{', '.join(key for key in known if _is_trained(getattr(mtq, key)))}"
        )
    found = copy.deepcopy(getattr(mtq, name))
    return dict(found)


def _is_trained(config: Mapping[str, Any]) -> bool:
    try:
        _checked("", config)
    except SetupError:
        return False
    return True


def _checked(
    name: str, config: Mapping[str, Any]
) -> tuple[int | tuple[int, int], int | tuple[int, int] | None, int | None]:
    """Bits of weights, of inputs, and the weights' block.

    Raises:
        SetupError: what ModelOpt does not know, or what could not be exported.
    """
    from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig

    def refuse(why: str) -> SetupError:
        return SetupError(
            f"{FLAG} {name}: {why}; see docs/quantisation.md for what is trained here"
        )

    try:
        QuantizeConfig(**dict(config))
    except (TypeError, ValueError) as error:
        raise refuse(" ".join(str(error).split())[:200]) from error
    algorithm = config.get("algorithm") or "max"
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    if method != "max":
        raise refuse(
            f"algorithm {method}: it moves weights by what each rank has seen, so that the result depends "
            f"on the layout"
        )
    if isinstance(algorithm, Mapping) and (more := set(algorithm) - {"method"}):
        raise refuse(f"algorithm: {', '.join(sorted(more))}: only its method can be chosen")
    usual = QuantizerAttributeConfig()
    bits: dict[str, Any] = {}
    blocks = set()
    entries = config["quant_cfg"]
    for entry in entries:
        pattern, on = str(entry.get("quantizer_name", "")), entry.get("enable", True)
        if re.search(r"\.\d|\[[^a-z]|\?", pattern):
            raise refuse(f"{pattern}: numbers of layers and experts begin anew on every rank")
        if not isinstance(on, bool):
            raise refuse(f"{pattern}: enable {on!r}: expected true or false")
        if not str(entry.get("parent_class") or "nn.").startswith("nn."):
            raise refuse(
                f"{pattern}: parent_class {entry['parent_class']}: name its matrices instead"
            )
        kind = pattern.rpartition("*")[2]
        attributes = entry.get("cfg")
        if not on:
            continue
        if kind not in ("weight_quantizer", "input_quantizer"):
            raise refuse(f"{pattern}: only weights and inputs of matrices are quantised")
        if isinstance(attributes, list):
            raise refuse(f"{kind}: several quantisers in a row")
        if attributes is None or entry.get("parent_class") is not None:
            raise refuse(f"{kind}: give cfg, and no parent_class, with what is quantised")
        value = attributes.get("num_bits", 8)
        value = tuple(value) if isinstance(value, list | tuple) else value
        if value != FP8 and not (isinstance(value, int) and 2 <= value <= 8):
            raise refuse(f"{kind}: num_bits {value} cannot be computed or exported here")
        if attributes.get("type", "static") != "static":
            raise refuse(f"{kind}: scales that change with every input are not exported")
        sizes = dict(attributes.get("block_sizes") or {})
        if sizes and (kind == "input_quantizer" or {str(key) for key in sizes} - {"-1", "type"}):
            raise refuse(
                f"{kind}: block_sizes {sizes}: only blocks of a matrix's inputs are exported"
            )
        if sizes.get("type", "static") != "static":
            raise refuse(f"{kind}: dynamic blocks are computed on CUDA only, and not exported here")
        axis = attributes.get("axis")
        if axis is not None and (kind == "input_quantizer" or axis != 0):
            raise refuse(
                f"{kind}: axis {axis}: exported are one scale a matrix or an output channel"
            )
        size = sizes.get(-1, sizes.get("-1"))
        if sizes and (type(size) is not int or size < 1):
            raise refuse(f"{kind}: block_sizes {sizes}: expected a number of inputs for -1")
        for key, given in attributes.items():
            if key not in _ATTRIBUTES and given != getattr(usual, key):
                raise refuse(f"{kind}: {key} {given} is not exported")
        if bits.setdefault(kind, value) != value:
            raise refuse(f"{kind}: {bits[kind]} and {value} bits in one model")
        if kind == "weight_quantizer":
            blocks.add(size)
    if not entries or dict(entries[0]) != {"quantizer_name": "*", "enable": False}:
        raise refuse(
            'quant_cfg must begin with {quantizer_name: "*", enable: false}: else all is quantised'
        )
    weights, those_inputs = (
        [name for name in _MATRICES if _is_on(entries, f"decoder.layers.0.{name}.{kind}_quantizer")]
        for kind in ("weight", "input")
    )
    if not weights:
        raise refuse("no weights are quantised")
    if len(blocks) > 1:
        raise refuse("weights have blocks of one size, all of them or none")
    (block,) = blocks
    if _is_on(entries, "output_layer.weight_quantizer") or _is_on(
        entries, "output_layer.input_quantizer"
    ):
        raise refuse(
            'the output layer stays as it is: add {quantizer_name: "*output_layer*", enable: false}'
        )
    alone = [name for name in _MATRICES if (name in weights) != (name in those_inputs)]
    if those_inputs and alone:
        raise refuse(f"{alone[0]}: weights and inputs of a matrix are exported in 8 bits together")
    inputs = bits.get("input_quantizer")
    if inputs is not None and (
        inputs != bits["weight_quantizer"] or inputs not in (8, FP8) or block
    ):
        raise refuse(
            "inputs are exported in 8 bits or FP8, beside weights of the same kind and without blocks"
        )
    return bits["weight_quantizer"], inputs, block


def _check_patterns(args: argparse.Namespace, found: Quantisation) -> None:
    """Refuse a pattern that names nothing of the model: another one was meant.

    Those of ModelOpt's own configurations name parts of other models, too.

    Raises:
        SetupError: naming it.
    """
    import modelopt.torch.quantization as mtq

    usual = {
        entry["quantizer_name"]
        for key, config in vars(mtq).items()
        if key.endswith("_CFG")
        for entry in config["quant_cfg"]
    }
    weights = model_weights(args.hf_config)
    matrices = [w.removesuffix(".weight") for w in weights if ".linear_" in w and "bias" not in w]
    names = [f"{m}.{kind}_quantizer" for m in matrices for kind in ("weight", "input", "output")]
    for pattern in (entry["quantizer_name"] for entry in found.config["quant_cfg"]):
        if pattern not in usual and not any(fnmatch(name, pattern) for name in names):
            shown = dict.fromkeys(re.sub(r".*?\d+\.(.*\.\d+\.)?", "", each) for each in matrices)
            raise SetupError(
                f"{FLAG} {found.name}: {pattern} names no matrix of this model; there are "
                f"{', '.join(shown)}, each with a weight_quantizer and an input_quantizer"
            )


def _is_on(entries: list[Any], name: str) -> bool:
    """Whether the last entry that names a quantiser of Megatron's layers enables it."""
    said = [
        entry.get("enable", True)
        for entry in entries
        if fnmatch(name, entry["quantizer_name"]) and entry.get("parent_class") is None
    ]
    return bool(said and said[-1])


def _check_blocks(args: argparse.Namespace, block: int) -> None:
    """Refuse blocks that a rank's part of a matrix would cut.

    Raises:
        SetupError: naming the size.
    """
    tensor = args.tensor_model_parallel_size
    expert = args.expert_tensor_parallel_size or tensor
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    head = args.v_head_dim if args.multi_latent_attention else head
    sizes = [("attention", args.num_attention_heads * head, tensor)]
    if args.num_experts is None or (
        isinstance(args.moe_layer_freq, list) and 0 in args.moe_layer_freq
    ):
        sizes += [("mlp", args.ffn_hidden_size, tensor)]
    if args.num_experts is not None:
        sizes += [("mlp", args.moe_ffn_hidden_size or args.ffn_hidden_size, expert)]
        sizes += [("mlp", args.moe_shared_expert_intermediate_size or 0, tensor)]
    for kind, size, ranks in sizes:
        if ranks > 1 and (size // ranks) % block:
            raise SetupError(
                f"{FLAG}: blocks of {block} inputs do not divide the {size // ranks} that each of {ranks} "
                f"ranks has of {_CUT_INPUTS[kind]}; use another block size or fewer tensor parallel ranks"
            )
