"""Specs made from the configs of other tools."""

from surgery.importing.mergekit import from_mergekit

__all__ = ["from_mergekit"]
