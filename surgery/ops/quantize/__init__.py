"""Ops that change how weights are stored."""
