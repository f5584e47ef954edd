"""Measurements: speed, model size, FLOPs, and the cost of the CUDA kernels."""
