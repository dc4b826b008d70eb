"""Models that cannot be hooked any more: compiled ones, which may never see a new hook, and those in a wrapper."""

from __future__ import annotations

from torch import nn

from surgery.errors import OpError, Problem
from surgery.runtime.building import modules_of

__all__ = ["check_unwrapped"]

# By name, so that none of them need be importable: of PEFT, and of torch.
COMPILED = "OptimizedModule"
WRAPPERS = ("PeftModel", "PeftMixedModel", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_unwrapped(model: nn.Module) -> None:
    """Raises OpError if the model, or a part of it, is compiled or wrapped."""
    for path, module in modules_of(model).items():
        where = f"`{path}` of this {type(model).__name__}" if path else f"this {type(model).__name__}"
        classes = {base.__name__ for base in type(module).__mro__}
        if COMPILED in classes or getattr(module, "_compiled_call_impl", None) is not None:
            fix = "attach first, and compile then"
            raise OpError(Problem(f"{where} is compiled: it would not see what is attached", fix=fix))
        wrapper = next((name for name in WRAPPERS if name in classes), None)
        if wrapper is not None:
            fix = "attach to the model before it is wrapped"
            raise OpError(Problem(f"{where} is a {wrapper}, which wraps a model and renames its modules", fix=fix))
