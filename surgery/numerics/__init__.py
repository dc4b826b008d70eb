"""Rounding, packing and reductions that ops share."""
