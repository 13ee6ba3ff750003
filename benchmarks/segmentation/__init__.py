"""Semantic segmentation with and without ProAC: data, a compact network, a trainer and a report."""
