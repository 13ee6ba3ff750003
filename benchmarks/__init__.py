"""Benchmarks of proac_cuda: what the loss costs, and what it does for a network."""
