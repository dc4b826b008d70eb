"""Ranges fetched ahead, without a network: whatever is asked for in whatever order comes, and within the budget."""

import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.checkpoint import SourceFile, midstate
from surgery.checkpoint.header import Header
from surgery.checkpoint.known import Known
from surgery.checkpoint.midstate import Sha256
from surgery.checkpoint.remote import Damaged, RemoteFile
from surgery.errors import CheckpointError, Problem
from surgery.stream import prefetch
from surgery.stream.prefetch import Prefetch
from surgery.stream.ranges import FileKey, Wanted

RANGE = 1000
HEADER = 100


class Served:
    """Files of random bytes, and what was fetched of them."""

    def __init__(self, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
        self.fetched = [bytearray(size) for size in sizes]  # how often each byte was
        self.lock = threading.Lock()
        self.failing: set[int] = set()
        self.files: dict[FileKey, SourceFile] = {}
        for number, raw in enumerate(self.content):
            remote = RemoteFile("org/x", "c" * 40, str(number), len(raw), hashlib.sha256(raw).hexdigest())
            header = Header({}, {}, HEADER, len(raw), "")
            self.files["source", str(number)] = SourceFile(str(number), remote, header, 0, remote.sha256)
        monkeypatch.setattr(prefetch, "fetch", self.fetch)

    def fetch(
        self, file: RemoteFile, start: int, stop: int, take: Callable[[bytes], None], cancelled: Callable[[], bool]
    ) -> None:
        number = int(file.name)
        if number in self.failing:
            raise CheckpointError(Problem("fails", str(file)))
        with self.lock:
            for position in range(start, stop):
                self.fetched[number][position] += 1
        middle = (start + stop) // 2
        take(self.content[number][start:middle])
        take(self.content[number][middle:stop])

    def known(self, number: int) -> Known:
        place = self.files["source", str(number)].place
        assert isinstance(place, RemoteFile)
        return place.known


def tensors_of(served: Served, rng: random.Random) -> list[tuple[FileKey, int, int]]:
    """Every file cut into tensors."""
    found: list[tuple[FileKey, int, int]] = []
    for key, file in served.files.items():
        position, size = HEADER, file.header.file_bytes
        while position < size:
            stop = min(size, position + rng.choice((3, 50, 700, 2500)))
            found.append((key, position, stop))
            position = stop
    return found


def wanted_of(tensors: list[tuple[FileKey, int, int]]) -> list[Wanted]:
    wanted: list[Wanted] = []
    for step, (key, start, stop) in enumerate(tensors):
        for cut in range(start, stop, RANGE):
            wanted.append(Wanted(key, cut, min(cut + RANGE, stop), len(wanted), step))
    return wanted


def read(reader: Prefetch, served: Served, key: FileKey, start: int, stop: int) -> None:
    buffer = bytearray(stop - start)
    reader.read_into(memoryview(buffer), key, start, stop)
    assert buffer == served.content[int(key[1])][start:stop]


ORDERS: dict[str, Callable[[list[Any], random.Random], list[Any]]] = {
    "of-the-files": lambda items, rng: items,
    "some-late": lambda items, rng: [x for x in items if x[2] - x[1] > 3] + [x for x in items if x[2] - x[1] == 3],
    "backwards": lambda items, rng: items[::-1],
    "none": lambda items, rng: rng.sample(items, len(items)),
    "half-of-them": lambda items, rng: rng.sample(items, len(items) // 2),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_gives_the_bytes_once(
    order: Callable[..., Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    served = Served([HEADER + rng.randrange(1, 30_000) for _ in range(rng.choice((1, 4)))], monkeypatch)
    tensors = order(tensors_of(served, rng), rng)
    reader = Prefetch(served.files, 16 * RANGE, RANGE)
    reader.expect(wanted_of(tensors), frozenset())
    for step, (key, start, stop) in enumerate(tensors):
        for position in range(start, stop, 333):
            read(reader, served, key, position, min(position + 333, stop))
        reader.passed(step)
    for key in served.files:
        assert reader.finish(key) in ("", served.files[key].sha256)
    reader.close()
    assert all(max(fetched) <= 1 for fetched in served.fetched)


@pytest.mark.parametrize("hashed", [frozenset[str](), frozenset({"source"})], ids=["", "hashed"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_what_is_known_is_not_fetched(
    order: Callable[..., Any], seed: int, hashed: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers, with what came after them, and records between the weights."""
    rng = random.Random(seed)
    served = Served([HEADER + rng.randrange(1, 30_000) for _ in range(rng.choice((1, 4)))], monkeypatch)
    for number, raw in enumerate(served.content):
        known = served.known(number)
        known.add(0, raw[: HEADER + rng.choice((0, 30, 4000, 40_000))])
        for start in rng.sample(range(0, len(raw), 40), min(5, len(raw) // 40)):
            if known.gaps(start, start + 7) == [(start, start + 7)]:
                known.add(start, raw[start : start + 7])
    tensors = order(tensors_of(served, rng), rng)
    reader = Prefetch(served.files, 16 * RANGE, RANGE)
    reader.expect(wanted_of(tensors), hashed)
    for step, (key, start, stop) in enumerate(tensors):
        for position in range(start, stop, 333):
            read(reader, served, key, position, min(position + 333, stop))
        reader.passed(step)
    for key, file in served.files.items():
        assert reader.finish(key) in ("", file.sha256)
    reader.close()
    for number, fetched in enumerate(served.fetched):
        gaps = served.known(number).gaps(0, len(fetched))
        assert max(fetched) <= 1
        assert sum(fetched) == sum(sum(fetched[start:stop]) for start, stop in gaps)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", [name for name in ORDERS if name != "half-of-them"])
def test_with_room_for_what_is_late_every_file_is_checked(
    order: str, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Read in its own order, and kept on scratch until it is needed: each byte once, and the hash of all of them."""
    rng = random.Random(seed)
    served = Served([HEADER + rng.randrange(1, 30_000) for _ in range(rng.choice((1, 4)))], monkeypatch)
    tensors = ORDERS[order](tensors_of(served, rng), rng)
    reader = Prefetch(served.files, 16 * RANGE, RANGE, tmp_path)
    reader.expect(wanted_of(tensors), frozenset(), 200_000)
    for step, (key, start, stop) in enumerate(tensors):
        for position in range(start, stop, 333):
            read(reader, served, key, position, min(position + 333, stop))
        reader.passed(step)
    assert [reader.finish(key) for key in served.files] == [file.sha256 for file in served.files.values()]
    reader.close()
    assert all(set(fetched) == {1} for fetched in served.fetched)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(6))
def test_what_nobody_expected_comes_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads again, in the wrong order, of other bytes than were announced, or none at all."""
    rng = random.Random(seed)
    served = Served([20_000, 3_000, 500], monkeypatch)
    tensors = tensors_of(served, rng)
    reader = Prefetch(served.files, 16 * RANGE, RANGE)
    reader.expect(wanted_of(tensors), frozenset())
    for step in range(len(tensors)):
        for _ in range(rng.choice((0, 1, 3))):
            key, start, stop = rng.choice(tensors)
            first = rng.randrange(start, stop)
            read(reader, served, key, first, rng.randrange(first, stop) + 1)
        reader.passed(step)
    for key, file in served.files.items():
        assert reader.finish(key) in ("", file.sha256)
    reader.close()


def test_a_failure_reaches_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served([5_000, 5_000], monkeypatch)
    served.failing = {1}
    tensors = tensors_of(served, random.Random(0))
    reader = Prefetch(served.files, 16 * RANGE, RANGE)
    reader.expect(wanted_of(tensors), frozenset())
    with pytest.raises(CheckpointError, match="fails"):
        for key, start, stop in tensors:
            read(reader, served, key, start, stop)
    with pytest.raises(CheckpointError, match="fails"):
        reader.finish(("source", "1"))
    reader.close()


def test_damage_is_found_at_the_end_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served([5_000], monkeypatch)
    ((key, file),) = served.files.items()
    tensors = tensors_of(served, random.Random(0))
    served.content[0] = served.content[0][:-1] + bytes([served.content[0][-1] ^ 1])
    reader = Prefetch({key: file}, 16 * RANGE, RANGE)
    reader.expect(wanted_of(tensors), frozenset())
    with pytest.raises(Damaged, match="is damaged: its sha256"):
        for _, start, stop in tensors:
            read(reader, served, key, start, stop)
        reader.finish(key)
    reader.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_hash_goes_on_where_it_was_put_down(seed: int) -> None:
    rng = random.Random(seed)
    raw = rng.randbytes(rng.choice((0, 1, 63, 64, 65, 200, 100_000)))
    digest = Sha256()
    for start in range(0, len(raw), step := rng.choice((1, 7, 64, 5000)) if len(raw) < 1000 else 5000):
        piece = raw[start : start + step]
        digest.update(rng.choice((bytes, bytearray, lambda data: memoryview(bytearray(data)), memoryview))(piece))
        assert digest.hexdigest() == hashlib.sha256(raw[: start + step]).hexdigest(), "asking changes nothing"
        digest = Sha256(digest.state)
    assert digest.hexdigest() == hashlib.sha256(raw).hexdigest()


def test_where_a_hash_cannot_be_put_down_it_is_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midstate, "_library", lambda: None)
    digest = Sha256()
    digest.update(b"abc")
    assert (digest.state, digest.hexdigest()) == ("", hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(ValueError, match="no state"):
        Sha256("00" * 112)
