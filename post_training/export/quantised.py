"""A quantised model as others read it.

Without scales of inputs it is an ordinary model: its weights are what the quantisers make of them. With
these its matrices are stored in 8 bits beside their scales, as `compressed-tensors` names them, which vLLM
reads and which ModelOpt's own exports name alike:

    ....q_proj.weight         int8 or float8_e4m3fn [output, input]
    ....q_proj.weight_scale   float32 [output, 1], or [1] for the whole matrix
    ....q_proj.input_scale    float32 [1]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from post_training.errors import SetupError
from post_training.files import json_object
from post_training.hf.weights import hf_state_dict

# By dtype: the largest number, and what compressed-tensors and ModelOpt call such matrices.
_KINDS: dict[torch.dtype, tuple[float, str, str, str]] = {
    torch.int8: (127.0, "int", "int-quantized", "W8A8_SQ_PER_CHANNEL"),
    torch.float8_e4m3fn: (448.0, "float", "float-quantized", "FP8"),
}


def _quantisers(model: torch.nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """Matrices whose weights are quantised, with their quantisers of weights and inputs."""
    for module in model.modules():
        weights = getattr(module, "weight_quantizer", None)
        if weights is not None and weights.is_enabled:
            yield module, weights, module.input_quantizer


def fold_weights(model: torch.nn.Module) -> bool:
    """Put what the quantisers make of weights in their place.

    Args:
        model: unwrapped.

    Returns:
        Whether inputs are quantised too, so that the model is more than its weights.

    Raises:
        SetupError: it was quantised elsewhere, to what cannot be stored.
    """
    found = list(_quantisers(model))
    inputs = [quantiser for _, _, quantiser in found if quantiser.is_enabled]
    for quantiser in inputs:
        if getattr(quantiser, "_amax", None) is None or quantiser._amax.numel() != 1:
            raise SetupError(
                "the model's inputs have no single scale a matrix: it cannot be exported"
            )
    with torch.no_grad():
        for module, weights, _ in found:
            # Whole numbers times their scale, which half precision would round once more.
            given = module.weight.float() if inputs else module.weight
            module.weight.data = weights(given)
            weights.disable()
            # Asked for by `stored_state`, which needs them still.
            weights.folded = True
    return bool(inputs)


def _folded(model: torch.nn.Module) -> list[Any]:
    """The matrices of `fold_weights`."""
    return [m for m in model.modules() if getattr(getattr(m, "weight_quantizer", 0), "folded", 0)]


def stored_state(model: torch.nn.Module, config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's tensors in 8 bits with their scales, and the quantisation of its config.json.

    Args:
        model: unwrapped, of folded weights.
        config: its HuggingFace configuration.
    """
    matrices = _folded(model)
    bits = {m.weight_quantizer.num_bits for m in matrices}
    dtype = torch.int8 if bits == {8} else torch.float8_e4m3fn
    largest, kind, form, algorithm = _KINDS[dtype]
    state = {name: value.cpu() for name, value in hf_state_dict(model, config).items()}
    # The same names and cuts: scales go the way of the weights that they belong to.
    scales = _in_place_of_weights(model, config, matrices, lambda m: m.weight_quantizer._amax)
    inputs = _in_place_of_weights(model, config, matrices, lambda m: m.input_quantizer._amax)
    by_row = any(module.weight_quantizer._amax.numel() > 1 for module in matrices)
    plain = []
    for name, scale in scales.items():
        if not bool(scale.isfinite().all()):
            if name.endswith(".weight") and state[name].dim() == 2:
                plain.append(name.removesuffix(".weight"))
            continue
        scale = scale[:, :1].float() / largest if by_row else scale[:1, 0].float() / largest
        value = state[name].float() / scale
        value = value.round().clamp(-128, 127) if kind == "int" else value.clamp(-448, 448)
        state[name] = value.to(dtype)
        stem = name.removesuffix("weight")
        state[stem + "weight_scale"] = scale.contiguous()
        state[stem + "input_scale"] = (inputs[name][:1, 0].float() / largest).contiguous()
    common = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel" if by_row else "tensor"},
        "input_activations": common | {"strategy": "tensor"},
    }
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": sorted({"lm_head"} | {name for name in plain if "embed" not in name}),
        "config_groups": {"group_0": group},
        "quant_algo": algorithm,
    }
    return state, quantisation


def _in_place_of_weights(
    model: torch.nn.Module, config: Any, matrices: list[Any], value: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """HuggingFace's tensors, if each number of a weight were its scale; not a number where it has none."""
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in kept:
        parameter.data = torch.full_like(data, float("nan"), dtype=torch.float32)
    for module in matrices:
        module.weight.data = value(module).float().expand_as(module.weight).contiguous()
    found = {name: tensor.cpu().clone() for name, tensor in hf_state_dict(model, config).items()}
    for parameter, data in kept:
        parameter.data = data
    return found


def write_quantisation(folder: Path, quantisation: dict[str, Any]) -> None:
    """Say in `config.json`, and in ModelOpt's own file, how matrices are stored."""
    import modelopt

    algorithm = quantisation.pop("quant_algo")
    config = json_object(folder / "config.json") | {"quantization_config": quantisation}
    told = {
        "producer": {"name": "modelopt", "version": modelopt.__version__},
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "exclude_modules": quantisation["ignore"],
        },
    }
    for name, content in (("config.json", config), ("hf_quant_config.json", told)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def reload(folder: Path, config: Any) -> Any:
    """The model as a server computes it, by plain transformers, but for `Inputs` that are not rounded yet.

    Args:
        folder: of the export.
        config: the HuggingFace configuration, without quantisation.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scales = {name: state.pop(name) for name in list(state) if name.endswith("_scale")}
    for name, value in state.items():
        scale = scales.get(f"{name}_scale")
        state[name] = value.float() if scale is None else value.float() * scale
    how = json_object(folder / "config.json")["quantization_config"]["config_groups"]["group_0"]
    whole = how["input_activations"]["type"] == "int"
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= set(model._tied_weights_keys or ()), (missing, unknown)
    model.tie_weights()
    for name, module in model.named_modules():
        if (scale := scales.get(f"{name}.input_scale")) is not None:
            module.inputs = Inputs(scale, whole)
            module.register_forward_pre_hook(module.inputs)
    return model.eval()


class Inputs:
    """What a server makes of a matrix's inputs, once `rounds` is set: whole numbers, or FP8."""

    def __init__(self, scale: Tensor, whole: bool) -> None:
        self.scale, self.whole, self.rounds, self.largest = scale, whole, False, 0.0

    def __call__(self, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the matrix gets: as a hook before its forward pass."""
        value = inputs[0] / self.scale
        if not self.rounds:
            self.largest = float(value.abs().max())
            return inputs
        if self.whole:
            value = value.round().clamp(-128, 127)
        else:
            value = value.clamp(-448, 448).to(torch.float8_e4m3fn).to(value.dtype)
        return (value * self.scale, *inputs[1:])


def without_rounding(
    model: torch.nn.Module, config: Any, compute: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """What a folded model gives where inputs are left as they are, from now on.

    Returns:
        Of `compute`; and by the name of HuggingFace's matrix its largest input, of what the scale can hold.
    """

    def see(quantiser: Any, inputs: tuple[Tensor, ...]) -> None:
        quantiser.largest = inputs[0].abs().max() / quantiser._amax

    matrices = _folded(model)
    for module in matrices:
        module.input_quantizer.disable()
        module.input_quantizer.register_forward_pre_hook(see)
    found = compute()
    seen = _in_place_of_weights(model, config, matrices, lambda m: m.input_quantizer.largest)
    return found, {
        name.removesuffix(".weight"): float(value.flatten()[0]) for name, value in seen.items()
    }


def compare_inputs(reloaded: torch.nn.Module, expected: dict[str, float]) -> float:
    """Largest relative difference to those of `without_rounding`; from now on inputs are rounded."""
    worst = 0.0
    for name, module in reloaded.named_modules():
        if isinstance(inputs := getattr(module, "inputs", None), Inputs):
            found = inputs.largest / (127.0 if inputs.whole else 448.0)
            worst = max(worst, abs(found / expected[name] - 1))
            inputs.rounds = True
    return worst
