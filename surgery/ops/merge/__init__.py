"""Ops that merge checkpoints, and adapters that stand for one."""
