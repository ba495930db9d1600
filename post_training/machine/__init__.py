"""What this process can learn of its device, disk, kernels and environment."""
