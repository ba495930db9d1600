"""Puts any causal language model of `transformers` in the place of Megatron's, packed documents apart."""
