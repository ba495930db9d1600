# ruff: noqa: F401 - imported for the processes that are forked from the one that imports this
"""What ranks import before their first step and at their end, imported once in the fork server."""

import torch._dynamo
import torch.utils.tensorboard
import transformers.models.auto.tokenization_auto

import finetune
import tests.helpers.launch
