"""Training flags of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class TrainFlags:
    """Flags that learn the task in about two minutes on a CPU; a field is a Megatron flag's name.

    Many small steps beat few large ones here: learning waits for attention heads that copy from the
    context, and these form after a number of updates, not of tokens.
    """

    seq_length: int = 256  # tokens a pack; the longest conversation has about half of that
    global_batch_size: int = 4  # packs a step
    micro_batch_size: int = 4  # packs a forward pass
    train_iters: int = 1000
    lr: float = 3e-3  # 6e-3 is clearly slower: the copying heads form late
    min_lr: float = 1e-4
    lr_warmup_iters: int = 50
    lr_decay_style: str = "cosine"
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    clip_grad: float = 1.0

    def to_args(self) -> list[str]:
        """Returns the flags as a command line: ``["--seq-length", "256", ...]``."""
        args: list[str] = []
        for field in fields(self):
            args += ["--" + field.name.replace("_", "-"), str(getattr(self, field.name))]
        return args


TRAIN_FLAGS = TrainFlags()
