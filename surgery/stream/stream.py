"""The schedule: which tiles are read and computed when, and how much may be in flight."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from surgery.cost import IN_FLIGHT_SHARE, RUNTIME_BYTES, Cost, tile_elements
from surgery.errors import OutputError, Problem
from surgery.graph import Kernel, Node, Source, TiledKernel, TileError, toposort
from surgery.layout import OutputFile, Placed
from surgery.numerics.dtypes import torch_dtype
from surgery.plan import Plan
from surgery.sizes import format_binary
from surgery.stream.budget import Budget
from surgery.stream.evaluate import Call, Evaluation, Need, Span, spans_of
from surgery.stream.read import BufferPool, SourceReader

__all__ = ["Chunk", "Resources", "Stream"]

COPY_BYTES = 1 << 20
T = TypeVar("T")
Read = dict[Need, Tensor]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Finished bytes of one output tensor, `start` counted from its first byte."""

    file: OutputFile
    placed: Placed
    start: int
    data: memoryview
    error: TileError | None


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use: bytes beyond the imports, compute threads, and the device of the kernels."""

    memory: int
    workers: int
    device: torch.device

    def fitted(self, cost: Cost) -> Resources:
        """The same with as many workers as the memory feeds. Raises OutputError if it feeds none."""
        if self.memory < cost.min_memory:
            what = (
                f"--memory {format_binary(self.memory)} is too little: this plan needs {format_binary(cost.min_memory)}"
            )
            if cost.largest_whole:
                what += f" ({format_binary(cost.largest_whole)} for a matrix that is needed whole)"
            raise OutputError(Problem(what, fix=f"give --memory {-(-cost.min_memory // (1 << 20))}MiB or more"))
        room = self.memory - cost.min_memory
        affordable = 1 + room // (3 * cost.tile_bytes) if cost.tile_bytes else self.workers
        return Resources(self.memory, max(1, min(self.workers, affordable)), self.device)

    def in_flight(self, cost: Cost) -> int:
        """Bytes for what is read and not yet written."""
        return int((self.memory - RUNTIME_BYTES - self.workers * cost.tile_bytes) * IN_FLIGHT_SHARE)


@dataclass(slots=True)
class _Item:
    """Something to hand over in order: chunks once `future` is done, then `done` gives back what they held."""

    future: Future[list[Chunk]]
    done: Callable[[], None]


@dataclass(slots=True)
class _Group:
    """The outputs of one evaluation."""

    file: OutputFile
    call: Call
    outputs: list[Placed] = field(default_factory=list[Placed])


class Stream:
    """Streams the output of a plan; iterate `chunks` once, then ask `source_hashes`."""

    def __init__(self, plan: Plan, resources: Resources) -> None:
        resources = resources.fitted(plan.cost)
        self._plan = plan
        self._device = resources.device
        self._budget = Budget(resources.in_flight(plan.cost))
        self._pool = BufferPool(self._budget.total // 8)
        self._reader = SourceReader(plan.checkpoint, self._pool)
        self._queue: queue.SimpleQueue[_Item | BaseException | None] = queue.SimpleQueue()
        self._look_ahead = 2 * resources.workers + 2
        self._executor = ThreadPoolExecutor(
            resources.workers, "surgery", initializer=torch.set_num_threads, initargs=(1,)
        )

    def chunks(self, files: Sequence[OutputFile]) -> Iterator[Chunk]:
        """Every byte of `files`, file by file, each tensor's in order. A chunk's data lives until the next one.

        Raises OpError for a weight that an op cannot take, CheckpointError for a source that fails.
        """
        num_threads = torch.get_num_threads()
        producer = threading.Thread(target=self._produce, args=(files,), name="surgery-read", daemon=True)
        producer.start()
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield from item.future.result()
                item.done()
        finally:
            self._budget.stop()
            self._executor.shutdown(wait=True, cancel_futures=True)
            producer.join()
            torch.set_num_threads(num_threads)

    def source_hashes(self) -> Mapping[str, str]:
        """The sha256, hex, of every source file, by name; reads what no tensor needed."""
        return self._reader.finish()

    def close(self) -> None:
        """Close the source files."""
        self._reader.close()

    def _produce(self, files: Sequence[OutputFile]) -> None:
        try:
            for file in files:
                for group in _groups(file):
                    self._schedule(group)
            self._queue.put(None)
        except BaseException as error:  # raised again by whoever takes the chunks
            self._queue.put(error)

    def _schedule(self, group: _Group) -> None:
        kernel, _ = group.call
        evaluation = Evaluation(self._device)
        if isinstance(kernel, Source):
            self._copy(group)
            return
        held = self._prepare(group.call, evaluation)
        if isinstance(kernel, TiledKernel):
            self._stream_tiles(group, evaluation, held)
            self._stream_whole_ports(group, evaluation)
        else:
            self._stream_whole(group, evaluation)
        self._release_wholes(evaluation)

    # Copies: bytes are bytes, whatever their dtype.

    def _copy(self, group: _Group) -> None:
        for placed in group.outputs:
            kernel = cast(Source, placed.node.kernel)
            num_bytes = placed.stop - placed.start
            for start in range(0, num_bytes, COPY_BYTES) if num_bytes else [0]:
                stop = min(start + COPY_BYTES, num_bytes)
                self._budget.acquire(stop - start)
                buffer = self._reader.read(kernel.name, start, stop)
                chunk = Chunk(group.file, placed, start, buffer.numpy().data, None)
                self._queue.put(_Item(_finished([chunk]), partial(self._give_back, [buffer], stop - start)))

    def _give_back(self, buffers: Iterable[Tensor], num_bytes: int) -> None:
        self._pool.give_back(buffers)
        self._budget.release(num_bytes)

    # First pass: what must be known before tiles can be computed.

    def _prepare(self, call: Call, evaluation: Evaluation) -> dict[Span, Read]:
        """Fill in states and whole values of the expression; return the tiles read on the way and kept."""
        held: dict[Span, Read] = {}
        for node in toposort(call[1]):
            if not isinstance(node.kernel, TiledKernel | Source):
                self._evaluate_whole(node, evaluation)
            elif isinstance(node.kernel, TiledKernel) and node.kernel.reduces and node.call not in evaluation.states:
                self._reduce(node.call, evaluation, {}, keep=False)
        kernel = call[0]
        if isinstance(kernel, TiledKernel) and kernel.reduces:
            num_bytes = sum(_bytes_needed(evaluation, call, span) for span in spans_of(call))
            self._reduce(call, evaluation, held, keep=num_bytes <= self._budget.total // 3)
        return held

    def _reduce(self, call: Call, evaluation: Evaluation, held: dict[Span, Read], *, keep: bool) -> None:
        kernel, inputs = call
        assert isinstance(kernel, TiledKernel)
        partials = self._partials(call, evaluation, held, keep=keep)
        evaluation.states[call] = kernel.combine(partials, *(node.type for node in inputs))

    def _partials(self, call: Call, evaluation: Evaluation, held: dict[Span, Read], *, keep: bool) -> Iterator[Tensor]:
        def submit(span: Span) -> Future[Tensor]:
            read = self._read(evaluation, call, span)
            if keep:
                held[span] = read
                return self._executor.submit(evaluation.partial, call, span, read)
            return self._executor.submit(self._partial_and_release, evaluation, call, span, read)

        return self._in_order(submit, spans_of(call))

    def _partial_and_release(self, evaluation: Evaluation, call: Call, span: Span, read: Read) -> Tensor:
        result = evaluation.partial(call, span, read)
        self._give_back(read.values(), _num_bytes(read))
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

    def _read(self, evaluation: Evaluation, call: Call, span: Span) -> Read:
        self._budget.acquire(_bytes_needed(evaluation, call, span))
        return {need: self._read_need(need) for need in evaluation.needed(call, span)}

    def _read_need(self, need: Need) -> Tensor:
        node, start, stop = need
        bits = node.type.dtype.bits
        return self._reader.read(cast(Source, node.kernel).name, start * bits // 8, stop * bits // 8)

    # Values that are needed whole.

    def _evaluate_whole(self, node: Node, evaluation: Evaluation) -> None:
        if node in evaluation.wholes:
            return
        inputs = [self._whole_input(child, evaluation) for child in node.inputs]
        self._budget.acquire(node.type.num_bytes)
        run = self._executor.submit(node.kernel.run, *inputs)
        evaluation.wholes[node] = run.result()[node.port]
        for child in node.inputs:
            evaluation.wholes.pop(child, None)
            self._budget.release(child.type.num_bytes)

    def _whole_input(self, node: Node, evaluation: Evaluation) -> Tensor:
        if node in evaluation.wholes:
            return evaluation.wholes[node]
        self._budget.acquire(node.type.num_bytes)
        flat = torch.empty(node.type.num_elements, dtype=_dtype(node), device=self._device)
        if isinstance(node.kernel, Source):
            raw = self._reader.read(node.kernel.name, 0, node.type.num_bytes)
            return raw.view(_dtype(node)).to(self._device).reshape(node.type.shape)
        self._fill(flat, node, evaluation)
        return flat.reshape(node.type.shape)

    def _fill(self, flat: Tensor, node: Node, evaluation: Evaluation) -> None:
        def submit(span: Span) -> Future[tuple[list[Tensor | None], TileError | None]]:
            read = self._read(evaluation, node.call, span)
            return self._executor.submit(self._tile_and_release, evaluation, node.call, span, read)

        position = 0
        for ports, _ in self._in_order(submit, spans_of(node.call)):
            value = cast(Tensor, ports[node.port])
            flat[position : position + value.numel()] = value
            position += value.numel()

    def _tile_and_release(
        self, evaluation: Evaluation, call: Call, span: Span, read: Read
    ) -> tuple[list[Tensor | None], TileError | None]:
        result = evaluation.tile(call, span, read)
        self._give_back(read.values(), _num_bytes(read))
        return result

    def _release_wholes(self, evaluation: Evaluation) -> None:
        """Give the memory of whole values back once everything before this point is written."""
        num_bytes = sum(node.type.num_bytes for node in evaluation.wholes)
        if num_bytes:
            self._queue.put(_Item(_finished([]), partial(self._budget.release, num_bytes)))

    # Main pass.

    def _stream_tiles(self, group: _Group, evaluation: Evaluation, held: dict[Span, Read]) -> None:
        call = group.call
        for span in spans_of(call):
            read = held.pop(span) if span in held else self._read(evaluation, call, span)
            written = sum(_span_bytes(placed.node, span) for placed in group.outputs)
            self._budget.acquire(written)
            future = self._executor.submit(_tile_chunks, group, evaluation, span, read)
            self._queue.put(_Item(future, partial(self._give_back, read.values(), _num_bytes(read) + written)))

    def _stream_whole_ports(self, group: _Group, evaluation: Evaluation) -> None:
        kernel, inputs = group.call
        assert isinstance(kernel, TiledKernel)
        ports = kernel.whole_ports(evaluation.states.get(group.call), *(node.type for node in inputs))
        chunks = [
            Chunk(group.file, placed, 0, _bytes_of(ports[placed.node.port]), None)
            for placed in group.outputs
            if placed.node.port in ports
        ]
        self._queue.put(_Item(_finished(chunks), _nothing))

    def _stream_whole(self, group: _Group, evaluation: Evaluation) -> None:
        for placed in group.outputs:
            self._evaluate_whole(placed.node, evaluation)
            data = _bytes_of(evaluation.wholes[placed.node])
            chunks = [
                Chunk(group.file, placed, start, data[start : start + COPY_BYTES], None)
                for start in range(0, len(data), COPY_BYTES)
            ]
            self._queue.put(_Item(_finished(chunks), _nothing))


def _groups(file: OutputFile) -> Iterable[_Group]:
    groups: dict[Call, _Group] = {}
    for placed in file.tensors:
        call: tuple[Kernel, tuple[Node, ...]] = placed.node.call
        groups.setdefault(call, _Group(file, call)).outputs.append(placed)
    return groups.values()


def _tile_chunks(group: _Group, evaluation: Evaluation, span: Span, read: Read) -> list[Chunk]:
    ports, error = evaluation.tile(group.call, span, read)
    chunks: list[Chunk] = []
    for placed in group.outputs:
        value = ports[placed.node.port]
        if value is not None:
            start = span[0] // _step(placed.node) * placed.node.type.dtype.bits // 8
            chunks.append(Chunk(group.file, placed, start, _bytes_of(value), error if placed.node.port == 0 else None))
    return chunks


def _step(node: Node) -> int:
    assert isinstance(node.kernel, TiledKernel)
    return node.kernel.port_steps()[node.port] or tile_elements(node.kernel)


def _span_bytes(node: Node, span: Span) -> int:
    return -(-(span[1] - span[0]) // _step(node)) * node.type.dtype.bits // 8


def _bytes_needed(evaluation: Evaluation, call: Call, span: Span) -> int:
    return sum((stop - start) * node.type.dtype.bits // 8 for node, start, stop in evaluation.needed(call, span))


def _num_bytes(read: Read) -> int:
    return sum(buffer.numel() for buffer in read.values())


def _bytes_of(value: Tensor) -> memoryview:
    flat = value.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _dtype(node: Node) -> torch.dtype:
    return torch_dtype(node.type.dtype)


def _finished(chunks: list[Chunk]) -> Future[list[Chunk]]:
    future: Future[list[Chunk]] = Future()
    future.set_result(chunks)
    return future


def _nothing() -> None:
    pass
