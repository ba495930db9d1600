"""Any causal language model of `transformers` where a model of Megatron's layers stands, documents kept apart."""
