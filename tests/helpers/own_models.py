"""Tasks with models of their own, in which ranks differ where the world does."""

import json
import os
from typing import Any

import numpy as np
import torch

RANK = int(os.environ.get("RANK", "0"))


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("numbers", "even")}


class Parity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.drop = torch.nn.Dropout(0.0)
        self.head: torch.nn.Module = torch.nn.Linear(16, 2)

    def forward(self, numbers):
        states = self.embedding(numbers).mean(1)
        for layer in self.layers:
            states = states + self.drop(torch.relu(layer(states)))
        return self.head(states)


class Plain:
    model: Any

    def build_model(self):
        return Parity()

    def build_dataloader(self, data_paths, eval_dataset=False):
        return [json.loads(line) for path in data_paths for line in open(path)], collate

    def get_train_model_output(self, batch):
        logits = self.model(batch["numbers"])
        loss = torch.nn.functional.cross_entropy(logits, batch["even"], reduction="sum")
        return loss, len(logits)

    def get_eval_model_output(self, batch):
        return (self.model(batch["numbers"]).argmax(-1) == batch["even"]).sum()


class Dropping(Plain):
    def build_model(self):
        model = Parity()
        model.drop.p = 0.3
        return model


class Tied(Plain):
    """Blocks that share a weight, one of them with a frozen bias."""

    def build_model(self):
        model = Parity()
        model.layers[1].weight = model.layers[0].weight
        model.layers[0].bias.requires_grad_(False)
        return model


class OtherWeights(Plain):
    """Random weights that no seed of torch's reaches."""

    def build_model(self):
        model = Parity()
        with torch.no_grad():
            for parameter in model.parameters():
                values = np.random.default_rng(RANK).normal(size=parameter.shape)
                parameter.copy_(torch.from_numpy(values))
        return model


class Statistics(Plain):
    """Statistics of batches, and an evaluation that any change of them moves."""

    def build_model(self):
        model = Parity()
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(16), model.head)
        return model

    def get_eval_model_output(self, batch):
        shares = self.model(batch["numbers"]).softmax(-1)
        return shares.gather(1, batch["even"][:, None]).sum()


class LoneMistake(Plain):
    def get_eval_model_output(self, batch):
        return 100 if RANK == 1 else super().get_eval_model_output(batch)
