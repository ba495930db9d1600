"""EAGLE-3 in plain PyTorch, one document at a time: what drafts here are compared with.

Written from the paper (arXiv 2503.01840) and from what servers compute with a draft folder; it shares no
code with the project. Keys and values of each query are kept in a list, as a server
keeps them while it drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """[heads, head_dim] at one position."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class PlainEagle:
    """A draft of the tensors of an exported folder."""

    def __init__(self, tensors: dict[str, Tensor], config: dict, embedding: Tensor) -> None:
        self.t, self.c, self.embedding = tensors, config, embedding

    def query(self, token: int, feature: Tensor, position: int):
        """Normed inputs to (query, key, value), each [heads, head_dim]."""
        eps, d = self.c["rms_norm_eps"], self.c["head_dim"]
        x = torch.cat(
            [
                rms_norm(self.embedding[token], self.t["midlayer.input_layernorm.weight"], eps),
                rms_norm(feature, self.t["midlayer.hidden_norm.weight"], eps),
            ]
        )
        q, k, v = ((self.t[f"midlayer.self_attn.{n}_proj.weight"] @ x).view(-1, d) for n in "qkv")
        theta = self.c["rope_theta"]
        return rotate(q, position, theta), rotate(k, position, theta), v

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        repeat = self.c["num_attention_heads"] // self.c["num_key_value_heads"]
        key = torch.stack(keys).repeat_interleave(repeat, dim=1)  # [seen, heads, d]
        value = torch.stack(values).repeat_interleave(repeat, dim=1)
        scores = torch.einsum("hd,shd->hs", query, key) / self.c["head_dim"] ** 0.5
        return torch.einsum("hs,shd->hd", scores.softmax(-1), value).flatten()

    def rest(self, feature: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """(what the next step reads, logits)."""
        eps = self.c["rms_norm_eps"]
        x = feature + self.t["midlayer.self_attn.o_proj.weight"] @ mixed
        y = rms_norm(x, self.t["midlayer.post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(self.t["midlayer.mlp.gate_proj.weight"] @ y)
        x = x + self.t["midlayer.mlp.down_proj.weight"] @ (
            gate * (self.t["midlayer.mlp.up_proj.weight"] @ y)
        )
        return x, self.t["lm_head.weight"] @ rms_norm(x, self.t["norm.weight"], eps)

    def losses(
        self,
        ids: Tensor,
        mask: Tensor,
        aux: Tensor,
        teacher_logits: Tensor,
        steps: int,
        detach: bool = False,
    ) -> Tensor:
        """Sum of KL(teacher || draft) at trained tokens of each step: [steps].

        Args:
            ids: int64 [tokens].
            mask: 1 where a token is trained.
            aux: [tokens, 3 * hidden].
            teacher_logits: of the base at each token, [tokens, draft vocabulary].
            steps: test-time steps.
            detach: no gradient from a step's input to the step before.
        """
        features = [self.t["fc.weight"] @ a for a in aux]
        base: list[tuple[Tensor, Tensor]] = []
        totals = [torch.zeros(()) for _ in range(steps)]
        for q in range(len(ids) - 1):
            token, feature = int(ids[q + 1]), features[q]
            query, key, value = self.query(token, feature, q)
            base.append((key, value))
            keys, values = [k for k, _ in base], [v for _, v in base]
            for step in range(steps):
                if step:
                    if q + 1 + step >= len(ids):
                        break
                    feature = feature.detach() if detach else feature
                    query, key, value = self.query(int(ids[q + 1 + step]), feature, q + step)
                    keys, values = [*keys, key], [*values, value]
                feature, logits = self.rest(feature, self.attend(query, keys, values))
                target = q + 2 + step
                if target < len(ids) and mask[target]:
                    wanted = teacher_logits[target - 1].log_softmax(-1)
                    found = logits.log_softmax(-1)
                    totals[step] = totals[step] + (wanted.exp() * (wanted - found)).sum()
        return torch.stack(totals)
