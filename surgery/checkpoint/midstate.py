"""A sha256 that can be put down in one process, and taken up in another.

`hashlib` cannot: the state is OpenSSL's, and stays in it. Its older interface keeps the state in the caller's memory,
as the bytes of a struct (`SHA256_CTX`, which has not changed in twenty years). It is looked for where hashlib itself
finds OpenSSL; where it is not, nothing can be put down, and a file is hashed from its start.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache

__all__ = ["Sha256", "can_go_on"]

CONTEXT_BYTES = 112  # eight words of state, two of length, 64 bytes of what fills no block, two counts
DIGEST_BYTES = 32


class Sha256:
    """The sha256 of bytes, with the state that it has come to."""

    def __init__(self, state: str = "") -> None:
        """`state`: what another one gave; of nothing by default. Raises ValueError for what is none."""
        self._library = _library()
        self._plain = hashlib.sha256() if self._library is None else None
        self._context = ctypes.create_string_buffer(CONTEXT_BYTES)
        if self._library:
            self._library.SHA256_Init(self._context)
        if state:
            raw = bytes.fromhex(state)
            if self._library is None or len(raw) != CONTEXT_BYTES:
                raise ValueError("no state of a sha256")
            self._context.raw = raw

    @property
    def state(self) -> str:
        """To go on from; nothing where it cannot be told. Takes as long as copying it."""
        return self._context.raw.hex() if self._library else ""

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes."""
        if self._plain:
            self._plain.update(data)
        elif self._library and len(data):
            is_writable = not memoryview(data).readonly
            pointer = (ctypes.c_char * len(data)).from_buffer(data) if is_writable else bytes(data)
            self._library.SHA256_Update(self._context, pointer, ctypes.c_size_t(len(data)))

    def hexdigest(self) -> str:
        """Of all bytes so far."""
        if self._plain:
            return self._plain.hexdigest()
        assert self._library
        copy = ctypes.create_string_buffer(self._context.raw, CONTEXT_BYTES)
        digest = ctypes.create_string_buffer(DIGEST_BYTES)
        self._library.SHA256_Final(digest, copy)
        return digest.raw.hex()


def can_go_on() -> bool:
    """Whether a state can be taken up here."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """OpenSSL, if it is there, and does what it did: its struct might be another one some day."""
    try:
        import _hashlib  # pyright: ignore[reportMissingModuleSource]

        library = ctypes.CDLL(_hashlib.__file__)
        context, digest = ctypes.create_string_buffer(2 * CONTEXT_BYTES), ctypes.create_string_buffer(DIGEST_BYTES)
        library.SHA256_Init(context)
        library.SHA256_Update(context, b"abc" * 50, ctypes.c_size_t(150))
        copy = ctypes.create_string_buffer(context.raw[:CONTEXT_BYTES], 2 * CONTEXT_BYTES)
        library.SHA256_Final(digest, copy)
    except (ImportError, OSError, AttributeError):
        return None
    return library if digest.raw == hashlib.sha256(b"abc" * 50).digest() else None
