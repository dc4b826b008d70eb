"""The header of a safetensors file, read and judged without touching the data.

Stricter than the reference parser where that is lenient against its own format: a key twice, or
a header that does not start with `{`, is refused.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from surgery.checkpoint.paths import is_text, open_regular, unrepeated
from surgery.errors import CheckpointError, Problem
from surgery.types import DType, TensorType

__all__ = [
    "MAX_NAME",
    "METADATA_KEY",
    "Extent",
    "Header",
    "encode_header",
    "is_name",
    "parse_header",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000  # the reference parser's limit
LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"  # the one entry of a header that is no tensor
MAX_TENSORS = 1_000_000  # tensors in one file; the largest models have a few hundred thousand in all
STRINGS_OF_TENSOR = 5
MAX_NAME = 500  # characters; the names of models have a tenth of that
MAX_STRINGS = 2 * 2_000_000  # in the metadata of one file, which has a few dozen
MAX_DEPTH = 64
MAX_DIMENSIONS = 64  # as many as torch and numpy know


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor in a file: its type and where its bytes lie, [start, stop) from the file's start."""

    type: TensorType
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, Extent]
    metadata: dict[str, str]
    num_bytes: int  # of the length field and the header: where the data starts
    file_bytes: int
    sha256: str  # of the length field and the header


def is_name(name: str) -> bool:
    """Whether a tensor can be called so: one line of text, of bounded length and depth."""
    return 0 < len(name) <= MAX_NAME and name.count(".") <= MAX_DEPTH and name.isprintable()


class _Refused(Exception):
    """Why a header does not hold; becomes a `CheckpointError` with the file's name."""


def read_header(path: Path) -> Header:
    """Read and check the header of the regular file `path`. Raises CheckpointError naming file and tensor."""
    with open_regular(path) as file:
        return parse_header(file, os.fstat(file.fileno()).st_size, str(path))


def parse_header(file: BinaryIO, file_bytes: int, at: str) -> Header:
    """Read and check the header at the start of `file`, of which no more is read. Raises CheckpointError."""
    try:
        return _parse(file, file_bytes)
    except _Refused as refused:
        fix = "download or copy the file again; it is damaged, or not a safetensors file"
        raise CheckpointError(Problem(str(refused), at, fix)) from None


def _parse(file: BinaryIO, file_bytes: int) -> Header:
    length_field = file.read(LENGTH_BYTES)
    if len(length_field) < LENGTH_BYTES:
        raise _Refused(f"is truncated: {file_bytes} bytes, too short for a safetensors header")
    length = int.from_bytes(length_field, "little")
    if length > MAX_HEADER_BYTES:
        raise _Refused(f"says its header has {length} bytes; the format allows {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise _Refused(f"is truncated: its header needs {LENGTH_BYTES + length} bytes, the file has {file_bytes}")
    raw = file.read(length)
    entries = _decode(raw)
    metadata = _metadata(entries.pop(METADATA_KEY, {}))
    data_start = LENGTH_BYTES + length
    types: dict[TensorType, TensorType] = {}  # millions of tensors have few types
    tensors = {name: _extent(name, entry, data_start, types) for name, entry in entries.items()}
    _check_coverage(tensors, data_start, file_bytes)
    digest = hashlib.sha256(length_field + raw).hexdigest()
    return Header(tensors, metadata, data_start, file_bytes, digest)


def _decode(raw: bytes) -> dict[str, object]:
    if not raw.startswith(b"{"):
        raise _Refused("has a header that does not start with `{`")
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b"[") > 2 * MAX_TENSORS:
        raise _Refused(f"has a header of more than {MAX_TENSORS} tensors")
    if raw.count(b'"') - 2 * raw.count(b'\\"') > 2 * (STRINGS_OF_TENSOR * raw.count(b"{") + MAX_STRINGS):
        raise _Refused(f"has a header of more than {MAX_STRINGS // 2} keys of `{METADATA_KEY}`")
    try:
        return cast(dict[str, object], json.loads(raw, object_pairs_hook=unrepeated))
    except (ValueError, RecursionError) as error:
        raise _Refused(f"has a header that is not JSON: {error}") from None


def _metadata(entry: object) -> dict[str, str]:
    items = cast(dict[str, object], entry) if isinstance(entry, dict) else None
    if items is None or not all(is_text(key) and is_text(value) for key, value in items.items()):
        raise _Refused("has a header whose `__metadata__` does not map strings to strings")
    return cast(dict[str, str], items)


def _extent(name: str, entry: object, data_start: int, types: dict[TensorType, TensorType]) -> Extent:
    fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
    shape = _integers(fields.get("shape"))
    offsets = _integers(fields.get("data_offsets"))
    if len(shape or ()) > MAX_DIMENSIONS:
        raise _Refused(f"has tensor `{name}` of more than {MAX_DIMENSIONS} dimensions")
    if not isinstance(fields.get("dtype"), str) or shape is None or offsets is None or len(offsets) != 2:
        raise _Refused(f"has a header whose entry of `{name}` lacks a valid dtype, shape or data_offsets")
    if not is_name(name):
        raise _Refused(f"has a tensor with the impossible name {name[:MAX_NAME]!r}")
    dtype_name = cast(str, fields["dtype"])
    try:
        type_ = TensorType(DType.from_disk(dtype_name), shape)
    except KeyError:
        raise _Refused(f"has tensor `{name}` of the unknown dtype `{dtype_name}`") from None
    begin, end = offsets
    if end - begin != type_.num_bytes:
        raise _Refused(f"lies about `{name}`: {type_} takes {type_.num_bytes} bytes, its offsets span {end - begin}")
    return Extent(types.setdefault(type_, type_), data_start + begin, data_start + end)


def _integers(value: object) -> tuple[int, ...] | None:
    items = cast(list[object], value) if isinstance(value, list) else [None]
    if all(type(item) is int and 0 <= item < 1 << 63 for item in items):
        return tuple(cast(list[int], items))
    return None


def _check_coverage(tensors: dict[str, Extent], data_start: int, file_bytes: int) -> None:
    position, before = data_start, "the header"
    for name, extent in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if extent.start != position:
            kind = "a hole" if extent.start > position else "an overlap"
            raise _Refused(f"has {kind} between {before} and `{name}`")
        position, before = extent.stop, f"`{name}`"
    if position > file_bytes:
        raise _Refused(f"is truncated: `{before.strip('`')}` ends at byte {position}, the file has {file_bytes}")
    if position < file_bytes:
        raise _Refused(f"has {file_bytes - position} bytes after its last tensor")


def encode_header(tensors: dict[str, tuple[TensorType, int]], metadata: dict[str, str]) -> bytes:
    """The length field and header of a file whose data holds `tensors` (name → type, offset in the data).

    Padded with spaces so that the data starts at a multiple of 8 bytes.
    """
    text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    result = bytearray(LENGTH_BYTES)  # grows in place: the header of millions of tensors is as large as a shard
    result += f'{{"{METADATA_KEY}":{text(metadata)},'.encode() if metadata else b"{"
    for name, (type_, offset) in tensors.items():
        shape, stop = ",".join(map(str, type_.shape)), offset + type_.num_bytes
        fields = f'"dtype":"{type_.dtype.disk_name}","shape":[{shape}],"data_offsets":[{offset},{stop}]'
        result += f"{text(name)}:{{{fields}}},".encode()
    result = result.removesuffix(b",") + b"}"
    result += b" " * (-len(result) % 8)
    result[:LENGTH_BYTES] = (len(result) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return bytes(result)
