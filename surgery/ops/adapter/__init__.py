"""Ops on adapters: made from adapters or checkpoints, or folded into weights."""
