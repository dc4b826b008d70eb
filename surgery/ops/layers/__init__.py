"""Ops on the layers of a model."""
