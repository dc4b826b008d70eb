"""Merges of task vectors: what each model adds to the base, pruned by the subclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph import Span
from surgery.numerics.dtypes import torch_dtype
from surgery.numerics.merge.kernel import MergeKernel

if TYPE_CHECKING:
    from torch import Tensor

    Pruner = Callable[[int, Tensor, int], Tensor]

__all__ = ["TaskArithmetic", "unpruned"]


@dataclass(frozen=True, slots=True)
class TaskArithmetic(MergeKernel):
    """base + lambda * sum(w_i (x_i - base)), over sum(w_i) where `normalize`.

    Inputs: the base, then the models, in the order of `weights`. With `consensus` (the election of
    TIES), an element counts where its sign is that of the weighted sum, and `normalize` divides by
    the weights that count.
    Source: arXiv 2212.04089; mergekit `task_arithmetic`, whose bits these are.
    """

    weights: tuple[float, ...]
    consensus: bool
    normalize: bool
    lambda_: float

    @property
    def num_inputs(self) -> int:
        """The base, and one for each weight."""
        return 1 + len(self.weights)

    def pruner(self, state: object, span: Span, *tiles: Tensor) -> Pruner:
        """What prunes piece after piece of one tile: (model, delta, first element of the piece) → delta.

        The delta, in scratch and of the working dtype, may be overwritten.
        """
        del state, span, tiles
        return unpruned

    def tile(self, state: object, partial: object, span: Span, *tiles: Tensor) -> tuple[Tensor | None, ...]:
        """One tile."""
        import torch

        from surgery.numerics.merge.mixing import Mixer
        from surgery.numerics.merge.pieces import delta, load, pieces, store

        base, models = tiles[0], tiles[1:]
        work = self.work(*tiles)
        mixer = Mixer(self.weights, work, base.device, self.consensus, self.normalize, self.lambda_)
        prune = self.pruner(state, span, *tiles)
        out = torch.empty(base.numel(), dtype=torch_dtype(self.dtype), device=base.device)
        for piece in pieces(base.numel()):
            base_piece = load(base[piece], work, "base")
            deltas = [
                prune(i, delta(x[piece], base_piece, f"delta {i}"), span[0] + piece.start) for i, x in enumerate(models)
            ]
            store(out, piece, mixer.merge(base_piece, deltas))
        return (out,)


def unpruned(index: int, delta: Tensor, start: int) -> Tensor:
    """Keeps all."""
    del index, start
    return delta
