"""Feed-forward layers: of one gated MLP, or of experts behind a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.tensors.weight import Layout, Weight, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Experts:
    """What the experts of a family are called, below `model.layers.N.` and in config.json."""

    router: str = "mlp.gate.weight"
    folder: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of gate, up and down."""
    size: str = "moe_intermediate_size"
    """The key of config.json that holds an expert's width."""
    count: str = "num_experts"
    """The key that holds the number of experts."""
    bias: str | None = None
    """What is added to the scores that experts are chosen by: no part of their weights, and not trained."""
    shared: str | None = None
    """The folder of what every token goes through, beside its experts."""
    normed: bool = True
    """Their weights add up to 1, where config.json does not say it in `norm_topk_prob`."""
    stacked: bool = False
    """One tensor holds every expert, with gate and up in one, and another their biases."""

    def flags(self, config: PretrainedConfig) -> dict[str, Any]:
        """Megatron's arguments about experts."""
        return {
            "num_experts": getattr(config, self.count),
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": getattr(config, self.size),
            "moe_layer_freq": self.layers(config),
            # Softmax over the chosen logits equals a renormalised softmax over all of them.
            "moe_router_pre_softmax": not getattr(config, "norm_topk_prob", self.normed),
        }

    @staticmethod
    def layers(config: PretrainedConfig) -> list[int]:
        """1 for each layer with experts, 0 for each without."""
        dense = getattr(config, "mlp_only_layers", None) or ()
        step = getattr(config, "decoder_sparse_step", 1)
        first = getattr(config, "first_k_dense_replace", None) or 0
        return [
            int(layer not in dense and layer >= first and (layer + 1) % step == 0)
            for layer in range(config.num_hidden_layers)
        ]


def expert_weights(config: PretrainedConfig, experts: Experts, here: str, there: str) -> Weights:
    """Router and experts of a layer."""
    count, size = getattr(config, experts.count), getattr(config, experts.size)
    router = {there + experts.router: (count, config.hidden_size)}
    weights = {here + "mlp.router.weight": Weight("replicated", router)}
    if experts.bias is not None:
        bias = {there + experts.bias: (count,)}
        weights[here + "mlp.router.expert_bias"] = Weight("replicated", bias)
    if experts.shared is not None:
        names = tuple(f"{there}{experts.shared}.{part}" for part in experts.projections)
        width = size * config.n_shared_experts
        weights |= mlp_weights(config.hidden_size, width, here + "mlp.shared_experts.", names)
    if experts.stacked:
        return weights | _stacked_experts(config, experts, here, there)
    for number in range(count):
        names = tuple(f"{there}{experts.folder}.{number}.{part}" for part in experts.projections)
        inside = f"{here}mlp.experts.local_experts.{number}."
        weights |= mlp_weights(config.hidden_size, size, inside, names, of_expert=True)
    return weights


def _stacked_experts(config: PretrainedConfig, experts: Experts, here: str, there: str) -> Weights:
    """Experts of a layer, and the biases of its router and of theirs."""
    hidden, size = config.hidden_size, getattr(config, experts.size)
    count = getattr(config, experts.count)
    router = experts.router.replace(".weight", ".bias")
    weights = {here + router: Weight("replicated", {there + router: (count,)})}
    tensors: dict[str, tuple[Layout, str, tuple[int, ...]]] = {
        "linear_fc1.weight": ("gate_up", "gate_up_proj", (hidden, 2 * size)),
        "linear_fc1.bias": ("gate_up", "gate_up_proj_bias", (2 * size,)),
        "linear_fc2.weight": ("columns", "down_proj", (size, hidden)),
        "linear_fc2.bias": ("replicated", "down_proj_bias", (hidden,)),
    }
    for number in range(count):
        inside = f"{here}mlp.experts.local_experts.{number}."
        for name, (layout, tensor, shape) in tensors.items():
            stacked = {f"{there}{experts.folder}.{tensor}": (count, *shape)}
            weights[inside + name] = Weight(layout, stacked, of_expert=True, expert=number)
    return weights


def mlp_weights(
    hidden: int, size: int, here: str, names: tuple[str, ...], *, of_expert: bool = False
) -> dict[str, Weight]:
    """Gate, up and down, by the names of their modules."""
    gate, up, down = (f"{name}.weight" for name in names)
    inner, outer = {gate: (size, hidden), up: (size, hidden)}, {down: (hidden, size)}
    return {
        here + "linear_fc1.weight": Weight("gate_up", inner, of_expert=of_expert),
        here + "linear_fc2.weight": Weight("columns", outer, of_expert=of_expert),
    }
