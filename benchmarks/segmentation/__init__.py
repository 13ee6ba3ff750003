"""Semantic segmentation with and without ProAC: data, a compact network, a trainer, a demo and a study."""
