"""Bytes of files on the Hub, range by range, through the client's own session, token and endpoint.

A range is read in one request, and what broke off is asked for from where it broke off. Nothing is taken on trust:
a range must come as exactly that range (206, Content-Range, length) of a file of the size, and at the commit, that
were listed. The Hub sends large files from another host, to which it gives a link that expires; the link is kept
until it does, and the token never goes there.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast
from urllib.parse import urljoin, urlsplit

from surgery.checkpoint.known import Known
from surgery.checkpoint.midstate import Sha256
from surgery.errors import CheckpointError, Problem

__all__ = [
    "Cancelled",
    "Damaged",
    "Digest",
    "RemoteFile",
    "attempts",
    "fetch",
    "fetch_bytes",
    "fetch_once",
    "hub_problem",
    "in_parallel",
    "pieces",
]

T = TypeVar("T")
S = TypeVar("S")

AT_ONCE = 16  # small requests
ATTEMPTS = 6  # in a row without a byte
REDIRECTS = 10
FIRST_WAIT = 0.25  # seconds; twice as long each time
LONGEST_WAIT = 8.0
PATIENCE = 30.0  # seconds until a server that sends less than this is given up
LEAST_RATE = 512  # bytes a second
LONGEST_RETRY_AFTER = 300.0  # a server that asks for more is not waited for
PIECE_BYTES = 8 << 20  # of a file that is copied
RETRIED = (408, 425, 429, 500, 502, 503, 504)
EXPIRED = (400, 401, 403, 404, 410)  # what a host says to a link that is not valid any more
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
RATE_LIMIT = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

pause = time.sleep  # so that a test need not wait


class Cancelled(Exception):
    """Raised where a range is read when nobody wants it any more."""


class Damaged(CheckpointError):
    """The bytes of weights are not those that the Hub lists: what was made of them must not be kept."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository on the Hub at a commit, as the Hub lists it."""

    repo: str
    commit: str
    name: str
    size: int
    sha256: str = ""  # of its bytes; empty for one that lies in git itself, as small files do
    oid: str = ""  # of its blob in git
    known: Known = field(default_factory=Known, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}/{self.name}"

    @property
    def url(self) -> str:
        """Where the Hub resolves it, at the endpoint that the client is set to."""
        from huggingface_hub import constants, hf_hub_url

        return hf_hub_url(self.repo, self.name, revision=self.commit, endpoint=constants.ENDPOINT)


class _Response(Protocol):
    """What is used of the client's response."""

    status_code: int

    @property
    def headers(self) -> Mapping[str, str]: ...
    def iter_raw(self) -> Iterator[bytes]: ...
    def read(self) -> bytes: ...


class _Again(Exception):
    """A request to be made again, after as many seconds as the server asks for."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class _TooSlow(_Again):
    """Bytes that come one by one: to go on like that would take days."""


class _Links:
    """Where the Hub redirected to, by URL."""

    def __init__(self) -> None:
        self._links: dict[str, str] = {}
        self._lock = threading.Lock()

    def get(self, url: str) -> str | None:
        with self._lock:
            return self._links.get(url)

    def put(self, url: str, link: str) -> None:
        with self._lock:
            self._links[url] = link

    def drop(self, url: str, link: str) -> None:
        with self._lock:
            if self._links.get(url) == link:
                del self._links[url]


_links = _Links()


def fetch(
    file: RemoteFile,
    start: int,
    stop: int,
    take: Callable[[bytes], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Give the bytes [start, stop) of `file` to `take`, in order, each of them once.

    Raises CheckpointError if they cannot be had, or are not those of the listed file; Cancelled.
    """
    position = start
    failed = 0
    while position < stop:
        begun = position
        try:
            for data in _read(file, position, stop):
                if cancelled():
                    raise Cancelled
                take(data)
                position += len(data)
            if position < stop:
                raise _Again(f"the connection ended {stop - position} bytes too early")
        except _Again as again:
            failed = 1 if position > begun and not isinstance(again, _TooSlow) else failed + 1
            if failed >= ATTEMPTS or (again.after or 0) > LONGEST_RETRY_AFTER:
                raise CheckpointError(_given_up(file, str(again))) from None
            if position == begun or again.after is not None:
                _wait(failed, again.after, cancelled)


def fetch_bytes(file: RemoteFile, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of `file`; all of it by default, which are then held against the digest that is listed."""
    parts: list[bytes] = []
    fetch(file, start, file.size if stop is None else stop, parts.append)
    content = b"".join(parts)
    if start == 0 and len(content) == file.size:
        digest = Digest(file)
        digest.update(content)
        digest.check()
    return content


def fetch_once(file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of `file`, which are kept with it: nobody fetches them again. For small parts of weights."""
    for begin, end in file.known.gaps(start, stop):
        file.known.add(begin, fetch_bytes(file, begin, end))
    return file.known.get(start, stop)


def pieces(file: RemoteFile) -> Iterator[bytes]:
    """All of `file`, a few megabytes at a time. Raises CheckpointError at the end if it is not what is listed."""
    digest = Digest(file)
    for start in range(0, file.size, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, file.size)
        parts: list[bytes] = []
        fetch(file, start, stop, parts.append)
        piece = b"".join(parts)
        digest.update(piece)
        yield piece
    digest.check()


class Digest:
    """The digest of a file as far as it was read, to be held against what the Hub lists: sha256, or that of git."""

    def __init__(self, file: RemoteFile, state: str = "") -> None:
        """`state`: that of the sha256 of what is read already."""
        self._file = file
        self._is_sha256 = bool(file.sha256)
        self._digest = Sha256(state) if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode())

    @property
    def state(self) -> str:
        """That of the sha256; nothing where it cannot be told."""
        return self._digest.state if isinstance(self._digest, Sha256) else ""

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._digest.update(data)

    def check(self) -> None:
        """Raises CheckpointError if the bytes are not those of the listed file."""
        listed = self._file.sha256 or self._file.oid
        if listed and self._digest.hexdigest() != listed:
            kind = "sha256" if self._is_sha256 else "git blob"
            what = f"is damaged: its {kind} is {self._digest.hexdigest()}, the Hub lists {listed}"
            raise CheckpointError(Problem(what, str(self._file), "run it again; a mirror or a proxy may be at fault"))


def in_parallel(do: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """What `do` gives for each of the items, in their order, a bounded number at once. Raises what the first raises."""
    with ThreadPoolExecutor(AT_ONCE, "surgery-hub") as executor:
        futures = [executor.submit(do, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def attempts(do: Callable[[], T]) -> T:
    """What a call of the client gives, again where the server or the network is at fault for the moment."""
    for failed in range(1, ATTEMPTS):
        try:
            return do()
        except Exception as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if status not in RETRIED and not _is_passing(error):
                raise
            after = _retry_after(cast(_Response, response).headers) if status is not None else None
            if (after or 0) > LONGEST_RETRY_AFTER or (_is_refused(error) and failed > 1):
                raise
            _wait(failed, after, lambda: False)
    return do()


def hub_problem(at: str, error: Exception) -> Problem:
    """What is wrong, and how to mend it, for an error of the client."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    fixes = {
        "RepositoryNotFoundError": "check the name, and log in with `hf auth login` if the repository is private",
        "GatedRepoError": "accept its terms on the Hub, and log in with `hf auth login`",
        "RevisionNotFoundError": "check what follows the @",
    }
    fix = fixes.get(type(error).__name__, "check the network and HF_ENDPOINT, or give a local directory")
    return Problem(f"is no local path, and cannot be had from the Hub: {first_line}", at, fix)


def _read(file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
    """The body of one answer, as far as it comes. Raises _Again for what may be better next time."""
    left = stop - start
    begun = time.monotonic()
    try:
        with _opened(file, start, stop) as response:
            for data in response.iter_raw():
                left -= len(data)
                if left < 0:
                    raise CheckpointError(_wrong(file, "sends more bytes than were asked for"))
                yield data
                seconds = time.monotonic() - begun
                if left and seconds > PATIENCE and (stop - start - left) / seconds < LEAST_RATE:
                    raise _TooSlow(f"it sends less than {LEAST_RATE} bytes a second")
    except (_Again, CheckpointError, Cancelled, GeneratorExit):
        raise
    except Exception as error:  # of the client: httpx's own, and OSErrors
        if not _is_passing(error):
            raise CheckpointError(hub_problem(str(file), error)) from error
        raise _Again(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(file: RemoteFile, start: int, stop: int) -> Generator[_Response]:
    """An answer whose body is the range that was asked for."""
    url = file.url
    target = _links.get(url) or url
    for _ in range(REDIRECTS):
        with _request(target, start, stop, is_hub=_origin(target) == _origin(url)) as response:
            location = response.headers.get("Location") if 300 <= response.status_code < 400 else None
            if target == url or _origin(target) == _origin(url):
                _check_listed(file, response)
            if location is None:
                _check_status(file, url, target, response)
                _check_range(file, start, stop, response)
                yield response
                return
        target = urljoin(target, location)
        if _origin(target) != _origin(url):
            _links.put(url, target)
    raise CheckpointError(_wrong(file, f"is redirected more than {REDIRECTS} times"))


@contextmanager
def _request(target: str, start: int, stop: int, *, is_hub: bool) -> Generator[_Response]:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # pyright: ignore[reportUnknownVariableType]

    headers = build_hf_headers(token=None if is_hub else False)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", target, headers=headers, follow_redirects=False, timeout=timeout) as response:
        yield cast(_Response, response)


def _check_listed(file: RemoteFile, response: _Response) -> None:
    """The Hub says with a file at which commit it is, and of what size and digest."""
    headers = response.headers
    if response.status_code >= 400:
        return
    tag = (headers.get("X-Linked-ETag") or (headers.get("ETag") if response.status_code < 300 else None) or "").strip()
    tag = tag.removeprefix("W/").strip('"')
    commit, size = headers.get("X-Repo-Commit"), headers.get("X-Linked-Size")
    is_other = bool(DIGEST.fullmatch(tag)) and tag not in (file.sha256, file.oid) and bool(file.sha256 or file.oid)
    if is_other or (commit or file.commit) != file.commit or (size or str(file.size)) != str(file.size):
        raise CheckpointError(_wrong(file, "is not what the Hub listed: its commit, size or ETag has changed"))


def _check_status(file: RemoteFile, url: str, target: str, response: _Response) -> None:
    status = response.status_code
    if status < 400:
        return
    if status in RETRIED:
        raise _Again(f"the server answers {status}", _retry_after(response.headers))
    if status == 416:
        raise CheckpointError(_wrong(file, "is not what the Hub listed: it is smaller"))
    if target != url and status in EXPIRED and _origin(target) != _origin(url):
        _links.drop(url, target)
        raise _Again(f"the link that the Hub gave is refused with {status}", after=0.0)
    from huggingface_hub.utils import hf_raise_for_status

    response.read()
    hf_raise_for_status(cast("object", response))  # pyright: ignore[reportArgumentType]


def _check_range(file: RemoteFile, start: int, stop: int, response: _Response) -> None:
    headers = response.headers
    encoding = headers.get("Content-Encoding") or "identity"
    length = headers.get("Content-Length")
    is_whole = response.status_code == 200 and (start, stop) == (0, file.size)
    if not is_whole:
        if response.status_code != 206:
            what = f"comes whole where bytes {start} to {stop} were asked for (status {response.status_code})"
            fix = "the server, or a proxy, knows no ranges: fetch it first, with --download"
            raise CheckpointError(Problem(what, str(file), fix))
        match = RANGE.fullmatch((headers.get("Content-Range") or "").strip())
        if match is None or tuple(map(int, match.groups())) != (start, stop - 1, file.size):
            said = headers.get("Content-Range")
            what = f"comes as {said!r} where bytes {start}-{stop - 1}/{file.size} were asked for"
            raise CheckpointError(_wrong(file, what))
    if encoding != "identity" or (is_whole and length is not None and int(length) != file.size):
        raise CheckpointError(_wrong(file, f"comes with the encoding {encoding} and the length {length}"))


def _wrong(file: RemoteFile, what: str) -> Problem:
    return Problem(what, str(file), "run it again; a mirror or a proxy may be at fault")


def _given_up(file: RemoteFile, why: str) -> Problem:
    fix = "check the network and HF_ENDPOINT, and run it again; `apply` goes on with --resume"
    return Problem(f"cannot be read from the Hub, again and again: {why}", str(file), fix)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks for, the Hub in a header of its own: `"api";r=0;t=55`."""
    said = (headers.get("Retry-After") or "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    reset = RATE_LIMIT.search(headers.get("RateLimit") or "")
    return float(reset[1]) if reset else None


def _is_passing(error: Exception) -> bool:
    """Whether an error of the client is one of the network, which may be better next time."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    names = {base.__name__ for base in type(error).__mro__}
    return not isinstance(error, OfflineModeIsEnabled) and bool(names & {"TransportError", "ConnectionError"})


def _is_refused(error: Exception) -> bool:
    return "ConnectError" in {base.__name__ for base in type(error).__mro__}


def _wait(failed: int, after: float | None, cancelled: Callable[[], bool]) -> None:
    """Longer each time, and not in step with others; as long as the server asks for where it does."""
    seconds = min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT) * (0.75 + os.urandom(1)[0] / 512)
    left = seconds if after is None else max(after, 0.05)
    while left > 0 and not cancelled():
        pause(min(left, 0.5))
        left -= 0.5
