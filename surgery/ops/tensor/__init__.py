"""Ops on tensors by name."""
