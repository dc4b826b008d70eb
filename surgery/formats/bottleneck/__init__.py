"""Bottleneck adapters: surgery's own layout for those at single Linears, initial values, and how they are attached."""
