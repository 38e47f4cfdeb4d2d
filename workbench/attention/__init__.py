"""Attention as it was computed: maps from the pipeline's own fused kernels, and the words behind them."""
