"""Everything between the packed data and Megatron's `pretrain()`."""
