# ruff: noqa: F401, E402 - imported for the processes that are forked from the one that imports this
"""What ranks import before their first step and at their end, imported once in the fork server."""

import logging
import warnings

# Said once for all ranks, and not by a run of its own: Transformer Engine and CUDA are missing.
warnings.simplefilter("ignore")
logging.getLogger("torch").setLevel(logging.ERROR)

import matplotlib.backends.backend_agg
import matplotlib.figure
import torch._dynamo
import torch.utils.tensorboard
import transformers.models.auto.tokenization_auto

import finetune
import tests.helpers.launch
