"""Streaming from the Hub: few requests, each byte once, nothing kept on disk, and no fault gives wrong bytes."""

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Content, Fault, Hub, command, files_of, serving
from jsonschema import Draft202012Validator
from safetensors.torch import save, save_file

import surgery
from surgery.checkpoint import remote
from surgery.checkpoint.remote import RemoteFile
from surgery.checkpoint.repository import read_headers

ROOT = Path(__file__).parents[1]
REPO = "org/model"
COMMIT = "c" * 40
NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DATA = r"^/cdn/.*safetensors"  # an answer with weights, of which the first two are headers
QUICK = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def weights(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two shards of several ranges each."""
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, file in enumerate(SHARDS):
        prefix = f"model.layers.{number}"
        shards[file] = {
            f"{prefix}.mlp.up_proj.weight": torch.randn(1024, 1024, generator=generator),
            f"{prefix}.mlp.down_proj.weight": torch.randn(512, 1024, generator=generator),
            f"{prefix}.input_layernorm.weight": torch.ones(1024),
        }
    return shards


def write_model(path: Path, seed: int) -> Path:
    path.mkdir()
    shards = weights(seed)
    for file, tensors in shards.items():
        save_file(tensors, path / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer.model").write_bytes(bytes(range(256)) * 40)
    (path / "assets").mkdir()
    (path / "assets" / "notice.txt").write_text("as it is\n")
    (path / "empty.txt").write_text("")
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("local") / "model", 0)


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("donor") / "model", 1)


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("third") / "model", 2)


@pytest.fixture
def hub(local: Path, donor: Path) -> Iterator[Hub]:
    with serving(REPO, {"main": COMMIT}, {COMMIT: files_of(local)}) as hub:
        hub.more = {"org/donor": {"d" * 40: files_of(donor)}}
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_spec(tmp_path, [NF4])
    return tmp_path


def write_spec(home: Path, edits: list[dict[str, Any]], source: str = REPO, **models: str) -> None:
    spec = {"version": 1, "source": source, **({"models": models} if models else {}), "edits": edits}
    (home / "spec.yaml").write_text(json.dumps(spec))


def apply(home: Path, hub: Hub, *options: str, **more: str) -> Any:
    return command(home, hub, "apply", "spec.yaml", "-o", "out", *options, **{**QUICK, **more})


def applied(home: Path, hub: Hub, *options: str, **more: str) -> dict[str, bytes]:
    run = apply(home, hub, *options, **more)
    assert run.returncode == 0, run.stderr
    return output(home / "out")


def refused(run: Any) -> str:
    assert run.returncode == 1, run.stderr
    assert run.stderr.startswith("error: "), run.stderr
    return run.stderr


def output(out: Path) -> dict[str, bytes]:
    """All files but the manifest, which names the source."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    del found["surgery-manifest.json"]
    return found


@pytest.fixture(scope="module")
def expected(local: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    surgery.apply(surgery.plan({"version": 1, "source": str(local), "edits": [NF4]}), out)
    return output(out)


def read_of(hub: Hub) -> dict[str, list[tuple[int, int]]]:
    """What was sent of weights, by `org/name/file`."""
    return {name: sorted(spans) for name, spans in hub.served.by_path.items() if name.endswith(".safetensors")}


def sent_once(hub: Hub) -> int:
    """Bytes of weights that were sent, none of them twice."""
    for file, spans in read_of(hub).items():
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans)), file
    return sum(stop - start for spans in read_of(hub).values() for start, stop in spans)


def size_of(*models: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))


def forget(hub: Hub) -> None:
    hub.requests.clear()
    hub.served.by_path.clear()
    hub.served.num_requests = hub.served.num_bytes = 0


# What it takes


def many_shards(num_shards: int) -> dict[str, Content]:
    weight_map: dict[str, str] = {}
    files: dict[str, Content] = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        tensors = {
            f"model.layers.{number}.{part}.weight": torch.zeros(32, 64)
            for part in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj")
        }
        files[name] = save(tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = b'{"model_type": "llama"}'
    return files


def test_a_plan_of_a_thousand_shards_takes_one_small_range_of_each(home: Path, hub: Hub) -> None:
    files = many_shards(1000)
    hub.files[COMMIT] = files
    run = command(home, hub, "plan", "spec.yaml", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["summary"]["change"] == 3000
    ranges = read_of(hub)
    assert len(ranges) == 1000 and all(len(spans) == 1 for spans in ranges.values())
    assert hub.served.num_requests == 1 + 2 + 2 * 1000  # the listing; index and config; each with its link
    headers = sum(
        struct.unpack("<Q", bytes(raw[:8]))[0] + 8 for name, raw in files.items() if f"{REPO}/{name}" in ranges
    )
    assert sum(stop for ((_, stop),) in ranges.values()) < 1.4 * headers < 600_000
    assert hub.most_at_once <= 16


def test_large_headers_are_fetched_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen of the largest that the format allows would take gigabytes. Small ones come side by side."""
    sizes = (10, 20, 2_000_000, 2_000_001)
    content = {str(size): save({"w": torch.zeros(2)}, {"note": "x" * size}) for size in sizes}
    meeting = {False: threading.Barrier(2, timeout=10), True: threading.Barrier(2, timeout=0.2)}
    fetched: list[tuple[str, int, int]] = []

    def fetch(file: RemoteFile, start: int, stop: int, take: Callable[[bytes], None]) -> None:
        is_rest = start > 0
        if is_rest or file.size < 1000:
            with suppress(threading.BrokenBarrierError):
                meeting[is_rest].wait()
        fetched.append((file.name, start, stop))
        take(content[file.name][start:stop])

    monkeypatch.setattr(remote, "fetch", fetch)
    files = {name: RemoteFile(REPO, COMMIT, name, len(raw)) for name, raw in content.items()}
    headers = read_headers(files, None)
    assert [header.metadata["note"] for header in headers.values()] == ["x" * int(name) for name in content]
    assert meeting[True].broken and not meeting[False].broken
    for (name, _, stop), (other, start, _) in pairwise(sorted(fetched)):
        assert name != other or stop <= start


@pytest.mark.parametrize("skip", [0, 2], ids=["headers", "weights"])
def test_several_ranges_are_in_flight(skip: int, home: Path, hub: Hub, expected: dict[str, bytes]) -> None:
    """The first two answers wait for each other."""
    hub.faults = [Fault("gather", DATA, 2, skip)]
    assert applied(home, hub, "--memory", "64MiB") == expected
    assert not hub.gathering.broken


def test_inspecting_reads_headers_alone(home: Path, hub: Hub, local: Path) -> None:
    run = command(home, hub, "inspect", REPO, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["bytes"] == surgery.inspect(local).num_bytes
    assert sum(stop - start for spans in read_of(hub).values() for start, stop in spans) < 4096
    assert not list((home / "cache").rglob("*.safetensors"))


EVERY_BYTE: dict[str, list[dict[str, Any]]] = {
    "nf4": [{**NF4, "double_quant": True}],
    "copy": [{"op": "tensor.rename", "tensors": r"model\.layers\.(\d+)\.(.*)", "to": r"model.blocks.\1.\2"}],
    "half-precision": [{"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"}],
    "several-edits": [
        {"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"},
        NF4,
        {"op": "attach.lora", "name": "train", "modules": "all-linear", "rank": 4, "alpha": 8},
    ],
}


@pytest.mark.parametrize(
    ("name", "memory"), [*((name, "64MiB") for name in EVERY_BYTE), ("nf4", "2GiB"), ("several-edits", "2GiB")]
)
def test_each_byte_of_the_source_is_sent_once(name: str, memory: str, home: Path, hub: Hub, local: Path) -> None:
    """From the plan to the last byte, headers included."""
    edits = EVERY_BYTE[name]
    write_spec(home, edits)
    out = applied(home, hub, "--memory", memory)
    assert sent_once(hub) == size_of(local)
    write_spec(home, edits, str(local))
    assert applied(home, hub, "--overwrite") == out


@pytest.mark.parametrize(
    ("op", "memory"),
    [("merge.ties", "least"), ("merge.ties", "2GiB"), ("merge.dare_linear", "least"), ("merge.model_stock", "least")],
)
def test_each_byte_of_every_model_of_a_merge_is_sent_once(
    op: str, memory: str, home: Path, hub: Hub, local: Path, donor: Path, third: Path
) -> None:
    """What two passes need, and does not fit the memory between them, lies on scratch, which is gone at the end."""
    names = ["other", "third"]
    parameters = {"weight": 1, "density": 0.4}
    merge = {"op": op, "models": names if op == "merge.model_stock" else dict.fromkeys(names, parameters)}
    hub.more["org/third"] = {"e" * 40: files_of(third)}
    write_spec(home, [merge], other="org/donor", third="org/third")
    least = json.loads(command(home, hub, "plan", "spec.yaml", "--json").stdout)["cost"]["min_memory_bytes"]
    forget(hub)
    out = applied(home, hub, "--memory", str(least) if memory == "least" else memory, "--workers", "1")
    assert sent_once(hub) == size_of(local, donor, third)
    assert {path.name for path in home.iterdir()} <= {"spec.yaml", "out", "cache"}
    write_spec(home, [merge], str(local), other=str(donor), third=str(third))
    assert applied(home, hub, "--overwrite") == out


def test_what_is_dropped_is_not_sent(home: Path, hub: Hub, local: Path) -> None:
    write_spec(home, [{"op": "tensor.drop", "tensors": r".*\.down_proj\.weight"}])
    out = applied(home, hub)
    assert sent_once(hub) < size_of(local) - 2 * 512 * 1024 * 4 + 2048  # of them what came with a header
    write_spec(home, [{"op": "tensor.drop", "tensors": r".*\.down_proj\.weight"}], str(local))
    assert applied(home, hub, "--overwrite") == out


@pytest.mark.parametrize("memory", ["64MiB", "2GiB"])
def test_any_memory_gives_the_same_bytes(memory: str, home: Path, hub: Hub, expected: dict[str, bytes]) -> None:
    assert applied(home, hub, "--memory", memory) == expected


def test_nothing_of_the_source_stays_on_disk(home: Path, hub: Hub) -> None:
    applied(home, hub)
    assert {path.name for path in home.iterdir()} <= {"spec.yaml", "out", "cache"}
    kept = [path for path in (home / "cache").rglob("*") if path.is_file()]
    assert not kept, kept


def hashes_of(out: Path) -> list[tuple[str, str | None]]:
    """What the manifest says of the source's weight files: the sha256 that the Hub lists, that of the bytes."""
    files = json.loads((out / "surgery-manifest.json").read_text())["source"]["files"]
    return [(entry["listed_sha256"], entry.get("sha256")) for entry in files]


@pytest.mark.parametrize("option", [(), ("--download",)], ids=["streamed", "downloaded"])
def test_the_manifest_tells_what_is_listed_from_what_was_hashed(option: tuple[str, ...], home: Path, hub: Hub) -> None:
    digests = [hub.sha256(hub.files[COMMIT][name]) for name in SHARDS]
    applied(home, hub, *option)
    assert hashes_of(home / "out") == [(digest, None) for digest in digests]
    applied(home, hub, *option, "--overwrite", "--hash-sources")
    assert hashes_of(home / "out") == [(digest, digest) for digest in digests]
    manifest = json.loads((home / "out" / "surgery-manifest.json").read_text())
    Draft202012Validator(json.loads((ROOT / "schemas" / "manifest.v1.schema.json").read_text())).validate(manifest)


def test_what_is_hashed_is_read_whole_and_once(home: Path, hub: Hub, local: Path) -> None:
    write_spec(home, [{"op": "tensor.drop", "tensors": r".*\.(up_proj|input_layernorm)\.weight"}])
    applied(home, hub, "--hash-sources")
    assert sent_once(hub) == size_of(local)
    digests = [hub.sha256(hub.files[COMMIT][name]) for name in SHARDS]
    assert hashes_of(home / "out") == [(digest, digest) for digest in digests]


def backwards(tensors: dict[str, torch.Tensor]) -> bytes:
    """A file that holds them from the last to the first."""
    entries: dict[str, object] = {}
    data = b""
    for name, tensor in sorted(tensors.items(), reverse=True):
        raw = tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_what_is_read_out_of_its_order_is_fetched_again_to_be_hashed(home: Path, hub: Hub, local: Path) -> None:
    """A donor whose tensors lie the other way round."""
    donor: dict[str, Content] = {file: backwards(tensors) for file, tensors in weights(1).items()}
    digests = [hub.sha256(donor[file]) for file in SHARDS]
    hub.more = {"org/donor": {"d" * 40: {**files_of(local), **donor}}}
    write_spec(home, [{"op": "merge.linear", "models": {"other": {"weight": 1}}}], str(local), other="org/donor")
    out = applied(home, hub, "--memory", "128MiB")
    assert sent_once(hub) == sum(map(len, donor.values()))
    forget(hub)
    assert applied(home, hub, "--memory", "128MiB", "--overwrite", "--hash-sources") == out
    files = json.loads((home / "out" / "surgery-manifest.json").read_text())["models"]["other"]["files"]
    assert [(entry["listed_sha256"], entry["sha256"]) for entry in files] == [(digest, digest) for digest in digests]
    sent = sum(stop - start for spans in read_of(hub).values() for start, stop in spans)
    headers = sum(8 + struct.unpack("<Q", bytes(raw[:8]))[0] for raw in donor.values())
    assert sent <= 2 * sum(map(len, donor.values())) - headers


def test_a_download_is_kept_and_used_from_then_on(home: Path, hub: Hub, expected: dict[str, bytes]) -> None:
    assert applied(home, hub, "--download") == expected
    manifest = (home / "out" / "surgery-manifest.json").read_bytes()
    forget(hub)
    assert applied(home, hub, "--overwrite") == expected
    assert not [path for _, path in hub.asked if "/resolve/" in path]
    assert (home / "out" / "surgery-manifest.json").read_bytes() == manifest
    (home / "cache").rename(home / "away")
    assert applied(home, hub, "--overwrite") == expected
    assert (home / "out" / "surgery-manifest.json").read_bytes() == manifest


def test_a_file_that_the_cache_holds_in_part_is_read_from_the_hub(
    home: Path, hub: Hub, expected: dict[str, bytes]
) -> None:
    assert command(home, hub, "plan", "spec.yaml", "--download").returncode == 0
    (cached,) = (home / "cache").rglob(SHARDS[1])
    os.truncate(cached, 100)
    forget(hub)
    assert applied(home, hub) == expected
    assert set(read_of(hub)) == {f"{REPO}/{SHARDS[1]}"}


def test_of_a_donor_only_what_is_needed_is_read(home: Path, hub: Hub, local: Path, donor: Path) -> None:
    merge = {"op": "merge.linear", "tensors": r".*\.0\.mlp\.down_proj\.weight", "models": {"other": {"weight": 1}}}
    write_spec(home, [merge], str(local), other="org/donor")
    out = applied(home, hub)
    write_spec(home, [merge], str(local), other=str(donor))
    assert applied(home, hub, "--overwrite") == out
    assert 512 * 1024 * 4 <= sent_once(hub) < 512 * 1024 * 4 + 8192
    manifest = json.loads((home / "out" / "surgery-manifest.json").read_text())
    assert manifest["spec"]["models"]["other"].startswith("sha256:")


@pytest.fixture
def shuffled(home: Path, hub: Hub) -> dict[str, bytes]:
    """The output of a merge with a donor whose one file has layer 10 before layer 2, as names are sorted."""
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (1024, 1024) for layer in (2, 10)}
    generator = torch.Generator().manual_seed(3)
    models = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]
    for name, tensors in zip(("source", "sorted"), models, strict=True):
        (home / name).mkdir()
        (home / name / "config.json").write_text('{"model_type": "llama"}')
        parts = [dict([item]) for item in tensors.items()] if name == "source" else [tensors]
        files = SHARDS if name == "source" else ("model.safetensors",)
        for file, part in zip(files, parts, strict=True):
            save_file(part, home / name / file, {"format": "pt"})
        weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        if len(files) > 1:
            (home / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        hub.more[f"org/{name}"] = {COMMIT: files_of(home / name)}
    merge = {"op": "merge.linear", "models": {"source": {"weight": 1}, "other": {"weight": 2}}}
    write_spec(home, [merge], str(home / "source"), other=str(home / "sorted"))
    found = applied(home, hub)
    write_spec(home, [merge], "org/source", other="org/sorted")
    return found


@pytest.mark.parametrize("memory", ["64MiB", "256MiB"])
def test_a_donor_in_another_order_is_sent_once_and_checked(
    memory: str, home: Path, hub: Hub, shuffled: dict[str, bytes]
) -> None:
    forget(hub)
    run = apply(home, hub, "--overwrite", "--memory", memory)
    assert (run.returncode, run.stderr) == (0, "wrote out\n")
    assert output(home / "out") == shuffled
    assert sent_once(hub) == size_of(home / "source", home / "sorted")


def test_a_donor_in_another_order_that_is_damaged_is_named(home: Path, hub: Hub, shuffled: dict[str, bytes]) -> None:
    for skip in (0, 1, 2):
        hub.faults = [Fault("corrupt", r"^/cdn/.*org/sorted", 1, 1 + skip)]
        text = refused(apply(home, hub, "--overwrite", "--memory", "64MiB"))
        assert "is damaged: its sha256" in text and "org/sorted" in text
    assert output(home / "out") == shuffled


def test_a_tensor_of_two_outputs_is_sent_once(home: Path, hub: Hub, local: Path) -> None:
    twice = {"op": "layers.select", "slices": [{"layers": [0, 2]}, {"layers": [0, 2]}]}
    write_spec(home, [twice])
    out = applied(home, hub, "--memory", "64MiB")
    assert sent_once(hub) == size_of(local)
    write_spec(home, [twice], str(local))
    assert applied(home, hub, "--overwrite") == out


def test_a_token_goes_to_the_hub_alone(home: Path, hub: Hub, expected: dict[str, bytes]) -> None:
    assert applied(home, hub, HF_TOKEN="hf_secret") == expected
    assert {request.token for request in hub.requests if request.host.startswith("127.")} == {"Bearer hf_secret"}
    assert {request.token for request in hub.requests if request.host.startswith("localhost")} == {""}


# What goes wrong, and is mended

MENDED = {
    "too-many-requests": Fault("status", DATA, 2, 2, "429 1"),
    "too-many-requests-at-the-start": Fault("status", "^/api/", 1, 0, "429 1"),
    "unavailable": Fault("status", DATA, 3, 2, "503"),
    "unavailable-listing": Fault("status", "^/api/", 2, 0, "500"),
    "unavailable-hub": Fault("status", "/resolve/.*safetensors", 2, 0, "502"),
    "bad-gateway-in-the-header": Fault("status", DATA, 1, 0, "502"),
    "connection-reset": Fault("reset", DATA, 3, 2),
    "connection-reset-in-a-side-file": Fault("reset", "tokenizer", 2),
    "stall": Fault("stall", DATA, 1, 2),
    "short-body": Fault("short", DATA, 3, 2),
    "expired-link": Fault("status", DATA, 2, 2, "403"),
    "a-mirror-that-lists-no-sizes": Fault("no_sizes", "^/api/", -1),
}


@pytest.mark.parametrize("fault", MENDED.values(), ids=MENDED)
def test_a_passing_fault_is_mended(fault: Fault, home: Path, hub: Hub, expected: dict[str, bytes]) -> None:
    hub.faults = [Fault(fault.kind, fault.path, fault.times, fault.skip, fault.value)]
    assert applied(home, hub) == expected
    assert fault.times < 0 or not hub.faults[0].times


def test_a_link_that_expires_again_and_again_is_asked_for_again(
    home: Path, hub: Hub, expected: dict[str, bytes]
) -> None:
    hub.link_uses = 1
    assert applied(home, hub, "--memory", "64MiB") == expected


def test_what_broke_off_goes_on_where_it_broke_off(home: Path, hub: Hub, local: Path) -> None:
    hub.faults = [Fault("short", DATA, 1, 2)]
    applied(home, hub)
    assert sent_once(hub) == size_of(local)


# What goes wrong, and is refused

OTHER = "is not what the Hub listed"
FATAL = {
    "ranges-are-ignored": (Fault("no_ranges", DATA, -1, 2), "comes whole where bytes", SHARDS[0]),
    "ranges-are-ignored-in-headers": (Fault("no_ranges", DATA, -1), "--download", SHARDS[0]),
    "another-range": (Fault("content_range", DATA, -1, 2, "bytes 0-9/10"), "comes as 'bytes 0-9/10'", SHARDS[0]),
    "a-smaller-range": (Fault("smaller_range", DATA, -1, 2), "were asked for", SHARDS[0]),
    "more-than-asked": (Fault("long", DATA, 1, 2), "more bytes than were asked for", SHARDS[0]),
    "another-commit": (Fault("commit", "/resolve/.*safetensors$", -1, 0, "e" * 40), OTHER, SHARDS[0]),
    "another-etag": (Fault("etag", "/resolve/.*safetensors$", -1, 0, "e" * 64), OTHER, SHARDS[0]),
    "damaged-weights": (Fault("corrupt", DATA, 1, 2), "is damaged: its sha256 is", "model-0000"),
    "damaged-config": (Fault("corrupt", "config.json", 1), "is damaged: its git blob is", "config.json"),
    "damaged-side-file": (Fault("corrupt", "cdn.*tokenizer.model", 1), "is damaged: its sha256 is", "tokenizer.model"),
    "gated": (Fault("gated", "/resolve/", -1), "accept its terms on the Hub", "org/model"),
    "refused-links": (Fault("status", DATA, -1, 2, "403"), "is refused with 403", SHARDS[0]),
    "a-wait-that-is-too-long": (Fault("status", DATA, -1, 2, "429 4000"), "answers 429", SHARDS[0]),
}  # fmt: skip


@pytest.mark.parametrize("case", FATAL.values(), ids=FATAL)
def test_a_lasting_fault_is_an_error_and_never_wrong_bytes(case: tuple[Fault, str, str], home: Path, hub: Hub) -> None:
    fault, message, file = case
    hub.faults = [Fault(fault.kind, fault.path, fault.times, fault.skip, fault.value)]
    text = refused(apply(home, hub, "--memory", "64MiB"))
    assert message in text and (file in text or file.replace("00001-of", "00002-of") in text)
    assert not (home / "out").exists()


def test_what_was_made_of_damaged_weights_is_not_gone_on_from(home: Path, hub: Hub, expected: dict[str, bytes]) -> None:
    for skip in range(2, 7):
        hub.faults = [Fault("corrupt", DATA, 1, skip)]
        assert "is damaged" in refused(apply(home, hub, "--overwrite", "--memory", "64MiB"))
        hub.faults = []
        assert applied(home, hub, "--overwrite", "--memory", "64MiB") == expected


@pytest.mark.parametrize("options", [[], ["--hash-sources"]])
def test_what_a_run_made_of_damaged_weights_before_it_was_stopped_is_not_gone_on_from(
    options: list[str], home: Path, hub: Hub, expected: dict[str, bytes]
) -> None:
    hub.faults = [
        Fault("corrupt", rf"^/cdn/.*{SHARDS[0]}", 1, 1),
        Fault("status", rf"^/cdn/.*{SHARDS[0]}", -1, 9, "503"),
    ]
    assert "again and again" in refused(apply(home, hub, *options, "--memory", "64MiB"))
    assert (home / ".out.surgery-partial").exists()
    hub.faults = []
    run = apply(home, hub, "--resume", *options, "--memory", "64MiB")
    if run.returncode:  # some of it was kept, and its hash gone on with
        assert "is damaged" in run.stderr and not (home / "out").exists()
        run = apply(home, hub, "--resume", *options, "--memory", "64MiB")
    assert run.returncode == 0 and output(home / "out") == expected


@pytest.mark.parametrize(("skip", "is_damaged"), [(5, False), (8, False), (8, True)])
def test_a_file_that_was_read_half_goes_on_from_there_and_is_checked_whole(
    skip: int, is_damaged: bool, home: Path, hub: Hub
) -> None:
    """One file of twelve megabytes; what is damaged was read before the stop, and found after it."""
    generator = torch.Generator().manual_seed(5)
    names = [f"model.layers.{layer:02}.mlp.up_proj.weight" for layer in range(48)]
    (home / "one").mkdir()
    save_file({name: torch.randn(256, 256, generator=generator) for name in names}, home / "one" / "model.safetensors")
    (home / "one" / "config.json").write_text('{"model_type": "llama"}')
    hub.more["org/one"] = {COMMIT: files_of(home / "one")}
    write_spec(home, [NF4], str(home / "one"))
    expected = applied(home, hub)
    write_spec(home, [NF4], "org/one")
    hub.faults = [Fault("status", "^/cdn/.*org/one", -1, skip, "503")]
    if is_damaged:
        hub.faults.append(Fault("corrupt", "^/cdn/.*org/one", 5, 1))
    assert "again and again" in refused(apply(home, hub, "--overwrite", "--memory", "64MiB"))
    hub.faults = []
    forget(hub)
    run = apply(home, hub, "--overwrite", "--resume", "--memory", "64MiB")
    assert sent_once(hub) < 0.9 * size_of(home / "one"), "what was read before the stop is read again"
    if is_damaged:
        assert run.returncode == 1 and "is damaged" in run.stderr
        run = apply(home, hub, "--overwrite", "--resume", "--memory", "64MiB")
    assert run.returncode == 0, run.stderr
    assert output(home / "out") == expected


def test_a_run_that_lost_the_hub_goes_on_with_resume(home: Path, hub: Hub, local: Path, tmp_path: Path) -> None:
    spec = {**json.loads((home / "spec.yaml").read_text()), "output": {"shard_size": "400KB"}}
    (home / "spec.yaml").write_text(json.dumps(spec))
    hub.faults = [Fault("status", rf"^/cdn/.*{SHARDS[1]}", -1, 1, "503")]
    text = refused(apply(home, hub, "--memory", "64MiB"))
    assert "again and again: the server answers 503" in text and SHARDS[1] in text
    assert not (home / "out").exists()
    hub.faults = []
    forget(hub)
    out = applied(home, hub, "--resume", "--memory", "64MiB")
    surgery.apply(surgery.plan({**spec, "source": str(local)}), tmp_path / "again")
    assert out == output(tmp_path / "again")
    sent = sum(stop - start for start, stop in read_of(hub).get(f"{REPO}/{SHARDS[0]}", []))
    assert sent < (local / SHARDS[0]).stat().st_size


@pytest.mark.parametrize("name", ["../up.txt", "/etc/up.txt", "a/../../up.txt", "a\\..\\up", "a//b", "nul\0.txt"])
def test_a_name_that_leads_out_of_the_repository_is_refused(name: str, home: Path, hub: Hub) -> None:
    hub.files[COMMIT][name] = b"out"
    assert "whose name is no path in it" in refused(apply(home, hub))


def test_a_shard_that_is_missing_is_named(home: Path, hub: Hub) -> None:
    del hub.files[COMMIT][SHARDS[1]]
    text = refused(apply(home, hub))
    assert f"names the shard `{SHARDS[1]}` (3 tensors), which is missing" in text and COMMIT in text


# What else lies on the Hub


def test_a_quantized_model_is_dequantized_from_the_hub(home: Path, hub: Hub, local: Path, tmp_path: Path) -> None:
    """Its records are read while planning, several at once."""
    surgery.apply(surgery.plan({"version": 1, "source": str(local), "edits": [NF4]}), tmp_path / "nf4")
    hub.files[COMMIT] = files_of(tmp_path / "nf4")
    back = {"op": "quantize.dequantize", "modules": "all-linear"}
    write_spec(home, [back])
    hub.faults = [Fault("gather", DATA, 2, 1)]
    out = applied(home, hub)
    assert not hub.gathering.broken
    assert sent_once(hub) == size_of(tmp_path / "nf4")
    write_spec(home, [back], str(tmp_path / "nf4"))
    assert applied(home, hub, "--overwrite") == out


def test_an_adapter_is_folded_from_the_hub(home: Path, hub: Hub, local: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    (tmp_path / "lora").mkdir()
    key = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {
        f"{key}.lora_A.weight": torch.randn(4, 1024, generator=generator),
        f"{key}.lora_B.weight": torch.randn(1024, 4, generator=generator),
    }
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    hub.more["org/lora"] = {"f" * 40: files_of(tmp_path / "lora")}
    fold = {"op": "adapter.fold", "models": {"tune": {"weight": 1}}}
    write_spec(home, [fold], tune="org/lora")
    out = applied(home, hub)
    assert sent_once(hub) == size_of(local, tmp_path / "lora")
    write_spec(home, [fold], tune=str(tmp_path / "lora"))
    assert applied(home, hub, "--overwrite") == out
