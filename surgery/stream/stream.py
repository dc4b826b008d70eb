"""The schedule: which tiles are read and computed when, and how much may be in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint, SourceFile
from surgery.cost import Cost
from surgery.graph import Call, Node, Source, Span, TiledKernel, toposort
from surgery.layout import OutputFile, Placed
from surgery.stream.allocator import give_back_large_blocks
from surgery.stream.budget import Budget
from surgery.stream.evaluate import Evaluation
from surgery.stream.first_pass import FirstPass, Partials, step_of
from surgery.stream.handover import Chunk, Handover, Item, TensorHashes
from surgery.stream.hub import Earlier, Fetching
from surgery.stream.intake import Intake, Loaded, Reading
from surgery.stream.needs import Step
from surgery.stream.read import BufferPool, FileKey, SourceReader
from surgery.stream.resources import Resources
from surgery.stream.whole import Begun

__all__ = ["Chunk", "Stream"]

P = ParamSpec("P")
T = TypeVar("T")
COPY_BYTES = 1 << 20
EARLIER = Earlier()
SMALL_BYTES = 1 << 20  # of the sources of one output: less is not worth a schedule of its own


@dataclass(slots=True)
class _Group:
    """The outputs of one evaluation."""

    file: OutputFile
    call: Call
    outputs: list[Placed]

    @property
    def sources(self) -> list[Node]:
        """What it is computed from."""
        return [node for node in toposort(self.call[1]) if isinstance(node.kernel, Source)]

    @property
    def num_written(self) -> int:
        """Bytes of its outputs."""
        return sum(placed.stop - placed.start for placed in self.outputs)

    def is_left(self, done: Collection[str]) -> bool:
        """Whether any of its outputs is not there yet."""
        return any(placed.name not in done for placed in self.outputs)

    @property
    def is_small(self) -> bool:
        """Whether it is evaluated in one go."""
        return max(self.num_written, sum(node.type.num_bytes for node in self.sources)) <= SMALL_BYTES


class Stream:
    """Streams what is computed from checkpoints; iterate `chunks` once, then ask `source_hashes`."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        cost: Cost,
        resources: Resources,
        hashed: Collection[str],
        scratch: Path,
        earlier: Earlier = EARLIER,
    ) -> None:
        """`checkpoints` are those that are read, `hashed` those of them whose files are hashed on the way.

        `scratch`: where temporary files may lie; `earlier`: what runs before this one have seen.
        """
        resources = resources.fitted(cost)
        give_back_large_blocks(resources.kept_by_a_thread)
        self._resources = resources
        self._budget = Budget(resources.in_flight(cost))
        self._window = Budget(resources.window(cost))
        pool = BufferPool(self._budget.total)
        fetching = Fetching(resources.prefetch(cost), resources.memory, scratch)
        self._reader = SourceReader(checkpoints, hashed, fetching, earlier)
        reserved = cost.largest_whole + cost.passing(resources.tile)
        self._intake = Intake(self._reader, pool, self._budget, reserved)
        self._handover = Handover()
        self._executor = ThreadPoolExecutor(
            resources.workers, "surgery", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._first_pass = FirstPass(self._intake, self._executor, look_ahead=2 * resources.workers + 2)

    def chunks(self, files: Sequence[OutputFile], done: Mapping[str, Collection[str]]) -> Iterator[Chunk]:
        """Every byte of `files`, file by file, each tensor's in order. A chunk's data lives until the next one.

        `done`: outputs, by file, that are there already; of one evaluation all or none. Raises OpError for a weight
        that an op cannot take, CheckpointError for a source that fails.
        """
        num_threads = torch.get_num_threads()
        threads = [
            threading.Thread(target=self._produce, args=(files, done), name="surgery-read", daemon=True),
            threading.Thread(target=self._handover.hash_tensors, name="surgery-hash", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield from self._handover.chunks()
        except BaseException:
            self._reader.stop()
            raise
        finally:
            self._intake.stop()
            self._window.stop()
            self._executor.shutdown(wait=True, cancel_futures=True)
            for thread in threads:
                thread.join()
            torch.set_num_threads(num_threads)

    @property
    def tensor_hashes(self) -> TensorHashes:
        """The sha256 of every tensor of which chunks were handed over: of all its chunks, once the last one was."""
        return self._handover.hashes

    def source_hashes(self) -> Mapping[FileKey, str]:
        """The sha256, hex, of every file of the models that are hashed; reads what no tensor needed."""
        return self._reader.finish()

    def newly_checked(self) -> list[str]:
        """Files that were held against what the Hub lists since this was asked last."""
        return self._reader.newly_checked()

    def newly_hashed(self) -> list[tuple[str, Begun]]:
        """How far files on the Hub were hashed, step by step since this was asked last."""
        return self._reader.newly_hashed()

    @property
    def unchecked(self) -> Sequence[SourceFile]:
        """After that: files that are needed whole, and were not held against the sha256 that the Hub lists."""
        return self._reader.unchecked

    def close(self) -> None:
        """Close the source files."""
        self._reader.close()

    def _produce(self, files: Sequence[OutputFile], done: Mapping[str, Collection[str]]) -> None:
        try:
            steps = [(group, self._step(group)) for file in files for group in _groups(file)]
            left = [(group, step) for group, step in steps if group.is_left(done.get(group.file.name, ()))]
            self._reader.expect([step for _, step in left], {name for _, step in steps for name in step.tensors})
            for number, (group, _) in enumerate(left):
                self._schedule(group)
                self._reader.passed(number)
            self._handover.put(None)
        except BaseException as error:  # raised again by whoever takes the chunks
            self._handover.put(error)

    def _step(self, group: _Group) -> Step:
        return step_of(group.call, len(group.outputs), group.num_written, self._intake.room, is_small=group.is_small)

    def _schedule(self, group: _Group) -> None:
        kernel = group.call[0]
        if isinstance(kernel, Source):
            self._copy(group)
            return
        if group.is_small:
            self._stream_small(group, group.sources)
            return
        evaluation = Evaluation(self._resources.device, self._resources.tile)
        partials = self._first_pass.prepare(group.call, evaluation)
        if isinstance(kernel, TiledKernel):
            self._stream_tiles(group, evaluation, partials)
            self._handover.put(Item(_finished(_whole_port_chunks(group, evaluation)), _nothing))
        else:
            self._handover.put(Item(_finished(_whole_chunks(group, evaluation)), _nothing))
        self._release(evaluation)

    def _stream_small(self, group: _Group, sources: Sequence[Node]) -> None:
        """Everything about a group in one go: with thousands of small tensors, each wait would count."""
        written = sum(placed.stop - placed.start for placed in group.outputs)
        passing = written + sum(node.type.num_bytes for node in sources)
        self._window.acquire(passing)
        self._budget.acquire(passing)
        loaded = {node: self._intake.read_whole(node) for node in sources}
        future = self._executor.submit(_small_chunks, group, self._resources, loaded)
        self._handover.put(Item(future, partial(self._give_back, (), passing)))

    def _copy(self, group: _Group) -> None:
        """Bytes are bytes, whatever their dtype."""
        for placed in group.outputs:
            num_bytes = placed.stop - placed.start
            for start in range(0, num_bytes, COPY_BYTES) if num_bytes else [0]:
                stop = min(start + COPY_BYTES, num_bytes)
                self._window.acquire(stop - start)
                buffer = self._intake.read_bytes(placed.node, start, stop)
                chunk = Chunk(group.file, placed, start, buffer.numpy().data)
                give_back = partial(self._give_back, [buffer], stop - start)
                self._handover.put(Item(_finished([chunk]), give_back))

    def _give_back(self, buffers: Iterable[Tensor], num_bytes: int) -> None:
        self._intake.give_back(buffers, num_bytes)
        self._window.release(num_bytes)

    def _release(self, evaluation: Evaluation) -> None:
        """Give the memory of what was held and whole back once everything before this point is written."""
        give_back = self._intake.let_go()

        def release() -> None:
            give_back()
            self._intake.release(evaluation.charged)

        self._handover.put(Item(_finished([]), release))

    def _stream_tiles(self, group: _Group, evaluation: Evaluation, partials: Partials) -> None:
        call = group.call
        for span in evaluation.spans(call):
            written = sum(_span_bytes(placed.node, span) for placed in group.outputs)
            needed = evaluation.needed(call, span)
            passing = self._intake.unheld(needed) + written
            self._window.acquire(passing)
            reading = self._intake.read(needed, written)
            first = partials.pop(span, None)
            future = self._executor.submit(_tile_chunks, group, evaluation, span, reading, first and first.result())
            give_back = partial(self._give_back, reading.owned, passing)
            self._handover.put(Item(future, give_back))


def _groups(file: OutputFile) -> list[_Group]:
    return [_Group(file, call, outputs) for call, outputs in file.by_call().items()]


def _tile_chunks(group: _Group, evaluation: Evaluation, span: Span, reading: Reading, partial: object) -> list[Chunk]:
    ports, error = evaluation.measured(group.call, span, reading.values, partial)
    chunks: list[Chunk] = []
    for placed in group.outputs:
        value = ports[placed.node.port]
        if value is not None:
            start = span[0] // _step(placed.node) * placed.node.type.dtype.bits // 8
            errors = (error,) if error and placed.node.port == 0 else ()
            chunks.append(Chunk(group.file, placed, start, _bytes_of(value), errors))
    return chunks


def _whole_port_chunks(group: _Group, evaluation: Evaluation) -> list[Chunk]:
    kernel, inputs = group.call
    assert isinstance(kernel, TiledKernel)
    ports = kernel.whole_ports(evaluation.states.get(group.call), *(node.type for node in inputs))
    return [
        Chunk(group.file, placed, 0, _bytes_of(ports[placed.node.port]))
        for placed in group.outputs
        if placed.node.port in ports
    ]


def _whole_chunks(group: _Group, evaluation: Evaluation) -> list[Chunk]:
    chunks: list[Chunk] = []
    for placed in group.outputs:
        data = _bytes_of(evaluation.ports[group.call][placed.node.port])
        if placed.node.port == 0 and evaluation.errors:
            chunks.append(Chunk(group.file, placed, 0, data[:0], tuple(evaluation.errors)))
        chunks += [
            Chunk(group.file, placed, start, data[start : start + COPY_BYTES])
            for start in range(0, len(data), COPY_BYTES)
        ]
    return chunks


def _small_chunks(group: _Group, resources: Resources, loaded: Mapping[Node, Tensor]) -> list[Chunk]:
    supply = Loaded(loaded)
    evaluation = Evaluation(resources.device, resources.tile)
    partials = FirstPass(supply, _Inline(), 0).prepare(group.call, evaluation)
    if not isinstance(group.call[0], TiledKernel):
        return _whole_chunks(group, evaluation)
    chunks: list[Chunk] = []
    for span in evaluation.spans(group.call):
        first = partials.get(span)
        reading = supply.read(evaluation.needed(group.call, span))
        chunks += _tile_chunks(group, evaluation, span, reading, first and first.result())
    return chunks + _whole_port_chunks(group, evaluation)


class _Inline(Executor):
    """Runs what it is given at once, in the thread that gives it."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _step(node: Node) -> int:
    assert isinstance(node.kernel, TiledKernel)
    return node.kernel.port_steps()[node.port] or 0


def _span_bytes(node: Node, span: Span) -> int:
    step = _step(node)
    return -(-(span[1] - span[0]) // step) * node.type.dtype.bits // 8 if step else 0


def _bytes_of(value: Tensor) -> memoryview:
    flat = value.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _finished(chunks: list[Chunk]) -> Future[list[Chunk]]:
    future: Future[list[Chunk]] = Future()
    future.set_result(chunks)
    return future


def _nothing() -> None:
    pass
