"""A Hub of our own on the loopback, for the true client: listings, redirects to a host of links that expire, ranges.

Large files lie in LFS, as on the Hub: `resolve` redirects to `localhost`, which is another origin than the endpoint's
`127.0.0.1`, with a link that is good for a number of requests. `faults` spoil answers, each a number of times.
"""

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

Content = bytes | memoryview
LFS_SUFFIXES = (".safetensors", ".bin", ".model")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Fault:
    """What goes wrong with answers whose path matches: `times` times (-1: always), after `skip` that go right."""

    kind: str
    path: str
    times: int = 1
    skip: int = 0
    value: str = ""


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    host: str
    path: str
    range: tuple[int, int] | None
    token: str


@dataclass
class Served:
    """What went out."""

    num_requests: int = 0
    num_bytes: int = 0
    by_path: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # of what links lead to: `org/name/file`


class Hub(ThreadingHTTPServer):
    """What a Hub answers to a client that lists and reads a model."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, repo: str, commits: Mapping[str, str]) -> None:
        """`commits`: revision → commit."""
        super().__init__(("127.0.0.1", 0), Answer)
        self.repo = repo
        self.revisions = {**commits, **{commit: commit for commit in commits.values()}}
        self.files: dict[str, dict[str, Content]] = {}  # by commit
        self.more: dict[str, dict[str, dict[str, Content]]] = {}  # of other repositories, at their only commit
        self.requests: list[Asked] = []
        self.served = Served()
        self.faults: list[Fault] = []
        self.link_uses = 1 << 30  # requests that a link is good for
        self.links: dict[str, list[Any]] = {}  # link → [content, uses left]
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.gathering = threading.Barrier(2, timeout=10)
        self.released = threading.Event()  # ends what stalls
        self._digests: dict[tuple[int, int], str] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Method and path of every request."""
        return [(request.method, request.path) for request in self.requests]

    def sha256(self, raw: Content) -> str:
        key = (id(raw), len(raw))
        if key not in self._digests:
            self._digests[key] = hashlib.sha256(raw).hexdigest()
        return self._digests[key]

    def fault(self, path: str, kinds: tuple[str, ...]) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.times and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is none of ours."""


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        with self.counted():
            self.answer()

    def do_HEAD(self) -> None:
        with self.counted():
            self.answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    @contextmanager
    def counted(self) -> Iterator[None]:
        hub = self.server
        path = unquote(self.path.partition("?")[0])
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        span = (int(asked[1]), int(asked[2]) + 1) if asked else None
        token = self.headers.get("Authorization", "")
        with hub.lock:
            hub.requests.append(Asked(self.command, self.headers.get("Host", ""), path, span, token))
            hub.served.num_requests += 1
            hub.at_once += 1
            hub.most_at_once = max(hub.most_at_once, hub.at_once)
        try:
            yield
        finally:
            with hub.lock:
                hub.at_once -= 1

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if fault := self.server.fault(path, ("status",)):
            status, _, after = fault.value.partition(" ")
            self.send(int(status), b"", {"Retry-After": after} if after else {})
            return
        if self.server.fault(path, ("gather",)):
            self.server.gathering.wait()
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            self.answer_link(path)
            return
        names = (self.server.repo, *self.server.more)
        found = [name for name in names if f"/{name}/" in f"{path}/"]
        if not found:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif parts[0] == "api":
            self.answer_api(found[0], parts[4:])
        else:
            self.answer_file(found[0], parts[3], "/".join(parts[4:]))

    def commit(self, repo: str, revision: str) -> str | None:
        if repo in self.server.more:
            (commit,) = self.server.more[repo]
            return commit
        return self.server.revisions.get(revision)

    def files(self, repo: str, commit: str) -> Mapping[str, Content]:
        return self.server.more[repo][commit] if repo in self.server.more else self.server.files.get(commit, {})

    def answer_api(self, repo: str, parts: list[str]) -> None:
        verb, *revision = parts or ["revision", "main"]
        commit = self.commit(repo, "/".join(revision))
        if commit is None:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return
        files = self.files(repo, commit)
        if verb == "tree":
            content: object = [
                {"type": "file", "path": name, **self.metadata(name, raw, "oid", "oid")} for name, raw in files.items()
            ]
        else:
            blobs = "blobs=" in self.path and not self.server.fault(self.path, ("no_sizes",))
            siblings = [
                {"rfilename": name, **(self.metadata(name, raw, "blobId", "sha256") if blobs else {})}
                for name, raw in files.items()
            ]
            content = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def metadata(self, name: str, raw: Content, oid: str, sha256: str) -> dict[str, object]:
        entry: dict[str, object] = {"size": len(raw), oid: git_oid(raw)}
        if is_lfs(name):
            entry[oid] = git_oid(name.encode())  # of the pointer
            entry["lfs"] = {"size": len(raw), sha256: self.server.sha256(raw), "pointerSize": 134}
        return entry

    def answer_file(self, repo: str, revision: str, name: str) -> None:
        hub = self.server
        path = unquote(self.path)
        commit = self.commit(repo, revision) or ""
        raw = self.files(repo, commit).get(name)
        if fault := hub.fault(path, ("gated",)):
            self.send(
                403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {repo} is restricted"}
            )
            return
        if raw is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if fault := hub.fault(path, ("commit",)):
            commit = fault.value
        if not is_lfs(name):
            self.send_content(raw, {"ETag": f'"{git_oid(raw)}"', "X-Repo-Commit": commit}, path)
            return
        tag = fault.value if (fault := hub.fault(path, ("etag",))) else hub.sha256(raw)
        with hub.lock:
            link = f"/cdn/{len(hub.links)}/{quote(repo)}/{quote(name)}"
            hub.links[unquote(link)] = [raw, hub.link_uses]
        headers = {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(raw)), "X-Repo-Commit": commit}
        location = f"http://localhost:{hub.server_port}{link}?Expires=1"
        self.send(302, b"", {**headers, "ETag": f'"{git_oid(name.encode())}"', "Location": location})

    def answer_link(self, path: str) -> None:
        hub = self.server
        with hub.lock:
            entry = hub.links.get(path, [b"", 0])
            entry[1] -= 1
        if entry[1] < 0 or self.headers.get("Authorization"):
            self.send(403, b"<Error>the link has expired, or a token came with it</Error>", {})
            return
        self.send_content(entry[0], {"ETag": '"of-the-other-host"'}, path)

    def send_content(self, raw: Content, headers: dict[str, str], path: str) -> None:
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        hub = self.server
        if asked is None or hub.fault(path, ("no_ranges",)):
            self.send(200, raw, headers, path)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(raw))
        if start >= len(raw):
            self.send(416, b"", {"Content-Range": f"bytes */{len(raw)}"})
            return
        shift = 8 if hub.fault(path, ("shifted",)) else 0
        said = f"bytes {start - shift}-{stop - 1 - shift}/{len(raw)}"
        if fault := hub.fault(path, ("content_range",)):
            said = fault.value
        body = memoryview(raw)[start - shift : stop - shift]
        if fault := hub.fault(path, ("corrupt",)):
            body = memoryview(bytes(body[:-1]) + bytes([body[-1] ^ 1]))
        if hub.fault(path, ("smaller_range",)):
            body, said = body[: len(body) // 2], f"bytes {start}-{start + len(body) // 2 - 1}/{len(raw)}"
        self.send(206, body, {**headers, "Content-Range": said}, path)

    def send(self, status: int, body: Content, headers: dict[str, str], path: str = "") -> None:
        fault = self.server.fault(path, ("reset", "stall", "short", "long")) if path else None
        length = len(body)
        if fault and fault.kind == "long":
            body = bytes(body) + b"more"
            length = len(body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind in ("reset", "stall", "short"):
            self.write(memoryview(body)[: len(body) // 2], path)
            self.break_off(fault.kind)
            return
        self.write(body, path)

    def write(self, body: Content, path: str) -> None:
        hub = self.server
        with hub.lock:
            hub.served.num_bytes += len(body)
            if path:
                asked = RANGE.fullmatch(self.headers.get("Range", ""))
                start = int(asked[1]) if asked else 0
                name = path.split("?")[0].split("/", 3)[3] if path.startswith("/cdn/") else path.split("?")[0]
                hub.served.by_path.setdefault(name, []).append((start, start + len(body)))
        self.wfile.write(body)

    def break_off(self, kind: str) -> None:
        self.wfile.flush()
        self.close_connection = True
        if kind == "stall":
            self.server.released.wait(60)
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def git_oid(raw: Content) -> str:
    return hashlib.sha1(f"blob {len(raw)}\0".encode() + bytes(raw)).hexdigest()


@contextmanager
def serving(repo: str, commits: Mapping[str, str], files: Mapping[str, dict[str, Content]]) -> Iterator[Hub]:
    hub = Hub(repo, commits)
    hub.files = dict(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


def files_of(directory: Path) -> dict[str, Content]:
    """What lies in a directory, as a repository holds it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def environment(home: Path, hub: Hub, **more: str) -> dict[str, str]:
    """That of a client of this Hub, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return {**kept, **ours, **more}


def command(home: Path, hub: Hub, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """`surgery` as a client of this Hub."""
    return subprocess.run(
        [sys.executable, "-m", "surgery", *arguments],
        cwd=home,
        env=environment(home, hub, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )
