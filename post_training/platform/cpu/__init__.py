"""Lets Megatron run where there is no CUDA device."""
