"""What must be known before the tiles of an output can be computed: reductions, and whole values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar, cast

import torch
from torch import Tensor

from surgery.graph import Node, Source, TiledKernel, TileError, toposort
from surgery.numerics.dtypes import torch_dtype
from surgery.stream.evaluate import Call, Evaluation, Span
from surgery.stream.intake import Intake, Read, num_bytes_of

__all__ = ["FirstPass", "Held"]

T = TypeVar("T")
Held = tuple[Read, Future[Tensor]]  # a tile that was read, and what the first pass gave for it
HELD_SHARE = 1 / 3  # of the budget: a tensor that fits is kept between its passes, so that it is read once


class FirstPass:
    """Fills in an `Evaluation`: states of reductions, and values that kernels need whole."""

    def __init__(self, intake: Intake, executor: Executor, look_ahead: int) -> None:
        self._intake = intake
        self._executor = executor
        self._look_ahead = look_ahead

    def prepare(self, call: Call, evaluation: Evaluation) -> dict[Span, Held]:
        """Everything below `call`, and its own state; returns the tiles read on the way and kept."""
        for node in toposort(call[1]):
            if not isinstance(node.kernel, TiledKernel | Source):
                self.evaluate_whole(node, evaluation)
            elif isinstance(node.kernel, TiledKernel) and node.kernel.reduces and node.call not in evaluation.states:
                self._reduce(node.call, evaluation, None)
        held: dict[Span, Held] = {}
        kernel = call[0]
        if isinstance(kernel, TiledKernel) and kernel.reduces:
            num_bytes = sum(self._intake.needs(evaluation, call, span) for span in evaluation.spans(call))
            fits = num_bytes <= self._intake.budget.total * HELD_SHARE
            self._reduce(call, evaluation, held if fits else None)
        return held

    def _reduce(self, call: Call, evaluation: Evaluation, held: dict[Span, Held] | None) -> None:
        kernel, inputs = call
        assert isinstance(kernel, TiledKernel)

        def submit(span: Span) -> Future[Tensor]:
            read = self._intake.read(evaluation, call, span)
            if held is None:
                return self._executor.submit(self._then_release, evaluation.partial, call, span, read)
            future = self._executor.submit(evaluation.partial, call, span, read)
            held[span] = (read, future)
            return future

        partials = self._in_order(submit, evaluation.spans(call))
        evaluation.states[call] = kernel.combine(partials, *(node.type for node in inputs))

    def _then_release(self, compute: Callable[[Call, Span, Read], T], call: Call, span: Span, read: Read) -> T:
        result = compute(call, span, read)
        self._intake.give_back(read.values(), num_bytes_of(read))
        return result

    def _in_order(self, submit: Callable[[Span], Future[T]], spans: Iterator[Span]) -> Iterator[T]:
        """Results in order of `spans`, a few computed ahead."""
        pending: deque[Future[T]] = deque()
        for span in spans:
            pending.append(submit(span))
            if len(pending) > self._look_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def evaluate_whole(self, node: Node, evaluation: Evaluation) -> None:
        """The whole value of `node`, whose kernel has no tiles; the budget is charged for it until it is released."""
        if node in evaluation.wholes:
            return
        inputs = [self._whole_input(child, evaluation) for child in node.inputs]
        self._intake.budget.acquire(node.type.num_bytes)
        run = self._executor.submit(node.kernel.run, *inputs)
        evaluation.wholes[node] = run.result()[node.port]
        for child in node.inputs:
            evaluation.wholes.pop(child, None)
            self._intake.budget.release(child.type.num_bytes)

    def _whole_input(self, node: Node, evaluation: Evaluation) -> Tensor:
        if node in evaluation.wholes:
            return evaluation.wholes[node]
        if isinstance(node.kernel, Source):
            raw = self._intake.read_bytes(node.kernel.name, 0, node.type.num_bytes)
            return raw.view(torch_dtype(node.type.dtype)).to(evaluation.device).reshape(node.type.shape)
        self._intake.budget.acquire(node.type.num_bytes)
        return self._filled(node, evaluation).reshape(node.type.shape)

    def _filled(self, node: Node, evaluation: Evaluation) -> Tensor:
        """All tiles of `node`, flat."""
        flat = torch.empty(node.type.num_elements, dtype=torch_dtype(node.type.dtype), device=evaluation.device)

        def submit(span: Span) -> Future[tuple[tuple[Tensor | None, ...], TileError | None]]:
            read = self._intake.read(evaluation, node.call, span)
            return self._executor.submit(self._then_release, evaluation.measured, node.call, span, read)

        position = 0
        for ports, error in self._in_order(submit, evaluation.spans(node.call)):
            value = cast(Tensor, ports[node.port])
            flat[position : position + value.numel()] = value
            evaluation.errors += [error] if error else []
            position += value.numel()
        return flat
