"""Ops that write an adapter beside the checkpoint: one file each."""
