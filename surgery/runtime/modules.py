"""What computes: bottlenecks that change a live model through forward hooks, so that its modules stay what they are.

Hooks are bound methods of the modules here, so that a deep copy of a model is hooked to its own adapters.

Legend: h what a sublayer gives, x the residual before it, A(z) = s·up(act(down z)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surgery.formats.bottleneck.layout import Placement, Sizes
from surgery.runtime.activations import FUNCTIONS

__all__ = ["AtModule", "Bottleneck", "InSlot", "Reads", "SlotModules"]

Reads = Literal["h", "h + x", "x"]
Arguments = tuple[object, ...]
Keywords = dict[str, object]


class Bottleneck(nn.Module, ABC):
    """A(z), and where it is put."""

    def __init__(self, sizes: Sizes, activation: str, scaling: float, dropout: float, *, bias: bool) -> None:
        super().__init__()
        self.adapter_down = nn.Linear(sizes.inputs, sizes.width, bias=bias)
        self.adapter_up = nn.Linear(sizes.width, sizes.outputs, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        self.scaling = scaling
        self.active = True

    @abstractmethod
    def hook(self) -> Iterator[RemovableHandle]:
        """Begin to change the model, hook by hook as they are asked for; removing the handles ends it."""

    def forward(self, z: Tensor) -> Tensor:
        """A(z), with the dtype and device of z whatever the adapter's are."""
        down = FUNCTIONS[self.activation](self.adapter_down(z.to(self.adapter_down.weight)))
        return self.dropout(self.adapter_up(down) * self.scaling).to(z)


@dataclass(frozen=True, slots=True, eq=False)
class SlotModules:
    """The modules of the model that a slot is made of; not among an adapter's own, since they are not its children."""

    output: nn.Module
    residual: nn.Module
    argument: tuple[int, str]
    norm: nn.Module | None


class InSlot(Bottleneck):
    """AdapterHub's: at what a sublayer gives. h + A(h), h + A(LN(h + x)) or h + A(x)."""

    def __init__(
        self, sizes: Sizes, activation: str, scaling: float, dropout: float, reads: Reads, modules: SlotModules
    ) -> None:
        super().__init__(sizes, activation, scaling, dropout, bias=True)
        self.reads: Reads = reads
        self._slot = modules
        self._x: Tensor | None = None

    def hook(self) -> Iterator[RemovableHandle]:
        """At the sublayer, and where x can be seen if it is needed."""
        yield self._slot.output.register_forward_hook(self._add)
        if self.reads != "h":
            yield self._slot.residual.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        del module
        index, name = self._slot.argument
        self._x = cast(Tensor, args[index] if index < len(args) else kwargs[name])

    def _add(self, module: nn.Module, args: Arguments, output: Tensor | tuple[Tensor, ...]) -> object:
        del module, args
        x, self._x = self._x, None  # not kept alive until the next batch
        if not self.active:
            return output
        if isinstance(output, tuple):
            return (output[0] + self(self._input(output[0], x)), *output[1:])
        return output + self(self._input(output, x))

    def _input(self, h: Tensor, x: Tensor | None) -> Tensor:
        if self.reads == "h":
            return h
        assert x is not None, "a sublayer gives before its residual is seen"
        if self.reads == "x":
            return x
        norm = self._slot.norm
        return h + x if norm is None else norm(h + x)


class AtModule(Bottleneck):
    """Surgery's own layout: Linear(x + A(x)), y + A(y) or y + A(x)."""

    def __init__(
        self, sizes: Sizes, activation: str, scaling: float, placement: Placement, module: nn.Module, *, bias: bool
    ) -> None:
        super().__init__(sizes, activation, scaling, 0.0, bias=bias)
        self.placement: Placement = placement
        self._module = (module,)  # a tuple, since it is not its child

    def hook(self) -> Iterator[RemovableHandle]:
        """At the module."""
        (module,) = self._module
        if self.placement == "before":
            yield module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            yield module.register_forward_hook(self._behind, with_kwargs=True)

    def _before(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        del module
        if not self.active:
            return args, kwargs
        x = _first(args, kwargs)
        changed = x + self(x)
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): changed}

    def _behind(self, module: nn.Module, args: Arguments, kwargs: Keywords, output: Tensor) -> Tensor:
        del module
        if not self.active:
            return output
        return output + self(output if self.placement == "after" else _first(args, kwargs)).to(output)


def _first(args: Arguments, kwargs: Keywords) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))
