"""Bottleneck adapters on a live torch model, in series and in parallel: attach, train, save, detach."""

from surgery.runtime.adapters import attach, attached, detach, save, set_active

__all__ = ["attach", "attached", "detach", "save", "set_active"]
