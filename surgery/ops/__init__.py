"""The ops: one file each, found by their path."""
