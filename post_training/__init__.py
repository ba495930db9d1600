"""Everything between the packed data and Megatron's `pretrain()`: arguments, batch, loss, attention,
HuggingFace conversion, checkpoints, metrics and the platform layer.
"""
