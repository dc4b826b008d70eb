"""What must be known before the tiles of an output can be computed: reductions, and whole values."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar, cast

import torch
from torch import Tensor

from surgery.graph import Call, Node, Source, Span, TiledKernel, TileError, calls_below, toposort
from surgery.numerics.dtypes import torch_dtype
from surgery.stream.evaluate import Evaluation, Ports
from surgery.stream.intake import Reading, Supply
from surgery.stream.needs import Step

__all__ = ["FirstPass", "Partials", "step_of"]

T = TypeVar("T")
Partials = dict[Span, Future[object]]  # what the last reduction gave for the tiles of the main pass


class FirstPass:
    """Fills in an `Evaluation`: states of reductions, and values that kernels need whole."""

    def __init__(self, intake: Supply, executor: Executor, look_ahead: int) -> None:
        self._intake = intake
        self._executor = executor
        self._look_ahead = look_ahead

    def prepare(self, call: Call, evaluation: Evaluation) -> Partials:
        """All that `call` needs before its first tile, itself where it has no tiles.

        Gives the partial results that the main pass can use again, if they are kept.
        """
        calls = calls_below(call)
        is_held = self._hold(calls)
        uses = Counter(child for _, inputs in calls for child in inputs)
        partials: Partials = {}
        for below in calls:
            kernel = below[0]
            if isinstance(kernel, TiledKernel):
                self._prepare_tiled(below, evaluation, partials if below == call and is_held else None)
            elif not isinstance(kernel, Source):
                self._evaluate(below, evaluation, uses)
        return partials

    def _hold(self, calls: list[Call]) -> bool:
        """Keep the sources of several passes in memory, if they fit."""
        if not any(isinstance(kernel, TiledKernel) and kernel.reductions for kernel, _ in calls):
            return False
        sources = list(dict.fromkeys(held_sources(calls)))
        if sum(node.type.num_bytes for node in sources) > self._intake.room:
            return False
        self._intake.hold(sources)
        return True

    def _prepare_tiled(self, call: Call, evaluation: Evaluation, partials: Partials | None) -> None:
        kernel, inputs = call
        assert isinstance(kernel, TiledKernel)
        for node, step in zip(inputs, kernel.input_steps(), strict=True):
            if step is None:
                self._load(node, evaluation)
        types = [node.type for node in inputs]
        for number in range(kernel.reductions):
            keeps = partials is not None and number == kernel.reductions - 1 and kernel.unit(*types) is None
            results = self._reduced(call, evaluation, partials if keeps else None)
            evaluation.combine(call, results)

    def _reduced(self, call: Call, evaluation: Evaluation, partials: Partials | None) -> Iterator[object]:
        def submit(span: Span) -> Future[object]:
            reading = self._intake.read(evaluation.needed(call, span))
            future = self._executor.submit(self._then_release, evaluation.partial, call, span, reading)
            if partials is not None:
                partials[span] = future
            return future

        return self._in_order(submit, evaluation.first_spans(call))

    def _then_release(self, compute: Callable[..., T], call: Call, span: Span, reading: Reading) -> T:
        try:
            return compute(call, span, reading.values)
        finally:
            self._intake.give_back(reading.owned, reading.num_bytes)

    def _in_order(self, submit: Callable[[Span], Future[T]], spans: Iterable[Span]) -> Iterator[T]:
        """Results in order of `spans`, a few computed ahead."""
        pending: deque[Future[T]] = deque()
        for span in spans:
            pending.append(submit(span))
            if len(pending) > self._look_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _evaluate(self, call: Call, evaluation: Evaluation, uses: Counter[Node]) -> None:
        """All ports of a kernel without tiles; `uses`: how often each input is needed still."""
        kernel, inputs = call
        values = [self._load(node, evaluation).reshape(node.type.shape) for node in inputs]
        types = kernel.infer(*(node.type for node in inputs))
        num_bytes = sum(type_.num_bytes for type_ in types)
        self._charge(evaluation, num_bytes)
        evaluation.ports[call], error = self._executor.submit(evaluation.run, call, values).result()
        evaluation.errors += [error] if error else []
        for node in inputs:
            uses[node] -= 1
            if not uses[node]:
                self._drop(node, evaluation)

    def _charge(self, evaluation: Evaluation, num_bytes: int) -> None:
        self._intake.charge(num_bytes)
        evaluation.charged += num_bytes

    def _drop(self, node: Node, evaluation: Evaluation) -> None:
        if isinstance(node.kernel, Source | TiledKernel):
            evaluation.wholes.pop(node, None)
            num_bytes = node.type.num_bytes
        else:
            ports = evaluation.ports.pop(node.call, ())
            num_bytes = sum(value.numel() * value.element_size() for value in ports)
        self._intake.release(num_bytes)
        evaluation.charged -= num_bytes

    def _load(self, node: Node, evaluation: Evaluation) -> Tensor:
        """The whole value of a node, flat."""
        if evaluation.whole(node) is None:
            self._charge(evaluation, node.type.num_bytes)
            evaluation.wholes[node] = self._whole(node, evaluation)
        value = evaluation.whole(node)
        assert value is not None
        return value

    def _whole(self, node: Node, evaluation: Evaluation) -> Tensor:
        if isinstance(node.kernel, Source):
            raw = self._intake.read_whole(node)
            return raw.view(torch_dtype(node.type.dtype)).to(evaluation.device)
        assert isinstance(node.kernel, TiledKernel)
        if node.kernel.port_steps()[node.port] is None:
            return evaluation.whole_port(node)
        return self._filled(node, evaluation)

    def _filled(self, node: Node, evaluation: Evaluation) -> Tensor:
        """All tiles of `node`, flat."""
        flat = torch.empty(node.type.num_elements, dtype=torch_dtype(node.type.dtype), device=evaluation.device)

        def submit(span: Span) -> Future[tuple[Ports, TileError | None]]:
            reading = self._intake.read(evaluation.needed(node.call, span))
            return self._executor.submit(self._then_release, evaluation.measured, node.call, span, reading)

        position = 0
        for ports, error in self._in_order(submit, evaluation.spans(node.call)):
            value = cast(Tensor, ports[node.port])
            flat[position : position + value.numel()] = value
            evaluation.errors += [error] if error else []
            position += value.numel()
        return flat


def held_sources(calls: Iterable[Call]) -> Iterator[Node]:
    """The sources that tiles of `calls` are cut from; what is needed whole is kept anyway."""
    for kernel, inputs in calls:
        if isinstance(kernel, TiledKernel):
            for node, step in zip(inputs, kernel.input_steps(), strict=True):
                if step is not None and isinstance(node.kernel, Source):
                    yield node


def step_of(call: Call, num_outputs: int, num_written: int, room: int, *, is_small: bool) -> Step:
    """The reads that evaluating `call` takes, or copying it to each of its outputs.

    `room` bytes can be held between the passes over it.
    """
    if isinstance(call[0], Source):
        return Step(((call[0].model, call[0].name),), num_outputs > 1, num_written)
    calls = calls_below(call)
    whole = set(_needed_whole(calls))
    nodes = sorted(
        (node for node in toposort(call[1]) if isinstance(node.kernel, Source)), key=lambda n: n not in whole
    )
    names = tuple((node.kernel.model, node.kernel.name) for node in nodes if isinstance(node.kernel, Source))
    reduces = any(isinstance(kernel, TiledKernel) and kernel.reductions for kernel, _ in calls)
    held = sum(node.type.num_bytes for node in dict.fromkeys(held_sources(calls)))
    return Step(names, reduces and not is_small and held > room, num_written)


def _needed_whole(calls: Iterable[Call]) -> Iterator[Node]:
    for kernel, inputs in calls:
        if isinstance(kernel, TiledKernel):
            yield from (node for node, step in zip(inputs, kernel.input_steps(), strict=True) if step is None)
