"""What the weights of an architecture are, under Megatron's names and HuggingFace's."""
