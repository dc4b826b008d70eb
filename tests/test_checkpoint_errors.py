"""Sources that are broken, or mean harm: each is refused as a CheckpointError that names the file, in bounded time."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MOST_SECONDS = 10  # a guard against hanging, far above what any of these takes
GIB = 1 << 30


@pytest.fixture(autouse=True)
def in_bounded_time() -> Iterator[None]:
    """What hangs fails instead."""

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"took more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards and their index."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({f"{name}.weight": torch.ones(4, 4)}, directory / shard)
    write_index(directory, {"a.weight": SHARDS[0], "b.weight": SHARDS[1]})
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_refused(source: Path, *names: str) -> str:
    """Both verbs that open `source` refuse it, naming `names` and how to mend it. Gives the message."""
    with pytest.raises(surgery.CheckpointError) as inspected:
        surgery.inspect(source)
    spec = {"version": 1, "source": str(source), "edits": [{"op": "tensor.cast", "tensors": ".*", "dtype": "float16"}]}
    with pytest.raises(surgery.CheckpointError) as planned:
        surgery.plan(spec)
    message = str(planned.value)
    assert message == str(inspected.value)
    assert [name for name in names if name not in message] == []
    message.encode()  # what cannot be printed helps nobody
    assert len(message) < 10_000
    assert not [problem for problem in planned.value.problems if "error: " in problem.what], "one message in another"
    return message


# Headers that lie


def header_of(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries).encode()


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(start: int = 0, stop: int = 4, dtype: object = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", "truncated"),
    "a length only": (lambda: struct.pack("<Q", 100), "truncated"),
    "less than a length": (lambda: b"\x10\0\0", "truncated"),
    "a length beyond the file": (lambda: file_of(b"{}", length=3), "truncated"),
    "a length beyond the format": (lambda: file_of(b"{}", length=100_000_001), "100000001"),
    "a length of all ones": (lambda: b"\xff" * 64, str(2**64 - 1)),
    "a header of nothing": (lambda: file_of(b""), "does not start"),
    "a pickle": (lambda: file_of(b"\x80\x04\x95cos\nsystem\n", length=10), "does not start"),
    "no JSON": (lambda: file_of(b"{nonsense}"), "not JSON"),
    "a JSON list": (lambda: file_of(b"[1, 2]"), "does not start"),
    "JSON cut off": (lambda: file_of(b'{"a": {"dtype"'), "not JSON"),
    "no UTF-8": (lambda: file_of(b'{"\xff\xfe": 1}'), "not JSON"),
    "UTF-16": (lambda: file_of('{"a": ""}'.encode("utf-16-le")), ""),
    "deep nesting": (lambda: file_of(b'{"a":' * 500_000 + b"1" + b"}" * 500_000), "not JSON"),
    "deep lists": (lambda: file_of(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "not JSON"),
    "a number of many digits": (lambda: file_of(b'{"a": ' + b"9" * 1_000_000 + b"}"), ""),
    "a tensor twice": (
        lambda: file_of(b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a": {"x": 1}}', b"\0" * 4),
        "`a` twice",
    ),
    "one of many tensors twice": (
        lambda: file_of(b"{" + b",".join(b'"%d":0' % index for index in range(400_000)) + b',"399999":0}'),
        "`399999` twice",
    ),
    "a field twice": (
        lambda: file_of(b'{"a": {"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "`dtype` twice",
    ),
    "an entry that is no map": (lambda: file_of(header_of({"a": 7})), "`a`"),
    "an entry without dtype": (lambda: file_of(header_of({"a": {"shape": [], "data_offsets": [0, 0]}})), "`a`"),
    "an entry without shape": (lambda: file_of(header_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}})), "`a`"),
    "an entry without offsets": (lambda: file_of(header_of({"a": {"dtype": "F32", "shape": [1]}})), "`a`"),
    "an unknown dtype": (lambda: file_of(header_of({"a": entry(dtype="F31")}), b"\0" * 4), "`F31`"),
    "a dtype that is no text": (lambda: file_of(header_of({"a": entry(dtype=["F32"])}), b"\0" * 4), "`a`"),
    "a negative shape": (lambda: file_of(header_of({"a": entry(shape=[-1, -1])}), b"\0" * 4), "`a`"),
    "a fractional shape": (lambda: file_of(header_of({"a": entry(shape=[1.0])}), b"\0" * 4), "`a`"),
    "a boolean shape": (lambda: file_of(header_of({"a": entry(shape=[True])}), b"\0" * 4), "`a`"),
    "a shape that is a map": (lambda: file_of(header_of({"a": entry(shape={"0": 1})}), b"\0" * 4), "`a`"),
    "a shape that overflows": (lambda: file_of(header_of({"a": entry(shape=[2**62, 4])}), b"\0" * 4), "`a`"),
    "a shape beyond 64 bits": (lambda: file_of(header_of({"a": entry(shape=[2**64 + 1])}), b"\0" * 4), "`a`"),
    "a shape of many dimensions": (lambda: file_of(header_of({"a": entry(shape=[2**62] * 400)}), b"\0" * 4), "`a`"),
    "a shape of too many dimensions": (
        lambda: file_of(header_of({"a": entry(shape=[2**62] * 100_000)}), b"\0" * 4),
        "`a`",
    ),
    "negative offsets": (lambda: file_of(header_of({"a": entry(-4, 0)}), b"\0" * 4), "`a`"),
    "offsets turned round": (lambda: file_of(header_of({"a": entry(4, 0)}), b"\0" * 4), "`a`"),
    "three offsets": (
        lambda: file_of(header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), b"\0" * 4),
        "`a`",
    ),
    "a size that is not the shape's": (lambda: file_of(header_of({"a": entry(0, 8)}), b"\0" * 8), "`a`"),
    "a hole": (lambda: file_of(header_of({"a": entry(), "b": entry(8, 12)}), b"\0" * 12), "hole"),
    "a hole at the start": (lambda: file_of(header_of({"a": entry(4, 8)}), b"\0" * 8), "hole"),
    "an overlap": (
        lambda: file_of(header_of({"a": entry(0, 8, shape=[2]), "b": entry(4, 8)}), b"\0" * 8),
        "overlap",
    ),
    "the same bytes twice": (lambda: file_of(header_of({"a": entry(), "b": entry()}), b"\0" * 4), "overlap"),
    "bytes after the last tensor": (lambda: file_of(header_of({"a": entry()}), b"\0" * 5), "1 bytes after"),
    "too little data": (lambda: file_of(header_of({"a": entry()}), b"\0" * 3), "truncated"),
    "an offset far away": (
        lambda: file_of(header_of({"a": entry(0, 2**62, dtype="U8", shape=[2**62])}), b"\0" * 4),
        "truncated",
    ),
    "a name with NUL": (lambda: file_of(header_of({"a\0b": entry()}), b"\0" * 4), "'a\\x00b'"),
    "a name of nothing": (lambda: file_of(header_of({"": entry()}), b"\0" * 4), "''"),
    "a name that is no text": (lambda: file_of(b'{"\\ud800": ' + header_of(entry()) + b"}", b"\0" * 4), "name"),
    "metadata that is no map": (lambda: file_of(header_of({"__metadata__": [1]})), "__metadata__"),
    "metadata of numbers": (lambda: file_of(header_of({"__metadata__": {"format": 1}})), "__metadata__"),
    "metadata that is no text": (lambda: file_of(b'{"__metadata__": {"\\udfff": "x"}}'), "__metadata__"),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_a_file_that_lies_is_refused(kind: str, model: Path) -> None:
    make, what = HOSTILE_FILES[kind]
    (model / "model.safetensors").write_bytes(make())
    assert_refused(model, "model.safetensors", what)
    assert_refused(model / "model.safetensors", "model.safetensors", what)


def test_a_header_as_large_as_the_format_allows_is_judged_in_bounded_time(model: Path) -> None:
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b"{")
        file.truncate(100_000_008)
    assert_refused(model, "model.safetensors", "not JSON")


def test_names_need_not_be_ascii(model: Path) -> None:
    name = "schicht.größe.权重"
    save_file({name: torch.ones(2)}, model / "model.safetensors")
    assert name in str(surgery.inspect(model).to_json())


# Shards and their index


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    assert_refused(sharded, INDEX, SHARDS[1], "missing", "download")


def test_every_missing_shard_is_named_at_once(sharded: Path) -> None:
    for shard in SHARDS:
        (sharded / shard).unlink()
    assert_refused(sharded, *SHARDS)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_shard_is_named(sharded: Path, kept: int) -> None:
    raw = (sharded / SHARDS[1]).read_bytes()
    (sharded / SHARDS[1]).write_bytes(raw[:kept])
    assert_refused(sharded, SHARDS[1], "truncated")


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "..", ".", "", "x.bin",
     "a\0b.safetensors", "~/x.safetensors", "x.safetensors/", "a" * 300 + ".safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_that_names_no_file_beside_it_is_refused(sharded: Path, file: str) -> None:
    shutil.copy(sharded / SHARDS[0], sharded.parent / "outside.safetensors")
    write_index(sharded, {"a.weight": SHARDS[0], "b.weight": file})
    assert_refused(sharded, str(sharded))


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a.weight": SHARDS[1], "b.weight": SHARDS[1], "c.weight": SHARDS[0]})
    assert_refused(sharded, INDEX, "`a.weight`", "`c.weight`", SHARDS[0])


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}, sharded / SHARDS[1])
    assert_refused(sharded, "`a.weight`", *SHARDS)


def test_a_name_that_is_hostile_in_the_index_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "\ud800\0": SHARDS[0]})
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "[]", "7", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}',
     '{"weight_map": null}', "[" * 200_000, '{"weight_map": ' + "9" * 10_000 + "}"],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert_refused(sharded, INDEX)


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert_refused(sharded, INDEX, "2 safetensors files")


# Directories


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, str(tmp_path), "model.safetensors")


def test_pickles_are_never_loaded(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert_refused(model, "pytorch_model.bin", "never loads", "save_pretrained")


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere", "does not exist")


def test_a_path_that_no_file_can_have_is_refused() -> None:
    assert_refused(Path("/" + "a" * 5000), "aaaa")
    assert_refused(Path("/tmp/a\0b"), "a")


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", "null", "[" * 200_000, '{"a": ' + "9" * 10_000])
def test_a_config_that_is_no_json_object_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    assert_refused(model, "config.json", "download")


def test_a_config_that_is_no_text_is_refused(model: Path) -> None:
    (model / "config.json").write_bytes(b'{"a": "\xff"}')
    assert_refused(model, "config.json")


def test_a_file_that_has_no_config_is_judged_by_names_and_shapes(model: Path) -> None:
    assert surgery.inspect(model / "model.safetensors").model_type == ""


# What stands where a file should


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused(model: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert_refused(model, name)


@pytest.mark.parametrize("name", [*SHARDS, INDEX])
def test_a_pipe_in_place_of_a_shard_or_an_index_is_refused(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    assert_refused(sharded, name)


def test_a_pipe_as_the_source_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", "model.safetensors")


def test_a_device_as_the_source_is_refused() -> None:
    assert_refused(Path("/dev/zero"), "/dev/zero")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_directory_in_place_of_a_file_is_refused(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()
    assert_refused(model, name)


@pytest.mark.parametrize("name", [SHARDS[1], INDEX])
def test_a_directory_in_place_of_a_shard_or_an_index_is_refused(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    (sharded / name).mkdir()
    assert_refused(sharded, name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_may_not_be_read_is_named(model: Path, name: str) -> None:
    (model / name).chmod(0)
    assert_refused(model, name)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_json_file_of_terabytes_is_refused_in_bounded_memory(sharded: Path, name: str) -> None:
    with (sharded / name).open("r+b") as file:
        file.truncate(1 << 42)  # sparse: it takes no room on the disk

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))

    command = [sys.executable, "-m", "surgery", "inspect", str(sharded)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, preexec_fn=limit)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: ") and name in run.stderr


# Links


def test_links_inside_the_checkpoint_are_followed(model: Path) -> None:
    (model / "real.data").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("real.data")
    assert len(surgery.inspect(model).checkpoint.tensors) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "sub/vocabulary.txt"])
def test_a_link_that_leads_out_is_refused(model: Path, name: str) -> None:
    outside = model.parent / "secret"
    path = model / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        shutil.move(path, outside)
    else:
        outside.write_text("secret")
    path.symlink_to(outside)
    assert_refused(model, name.rpartition("/")[2], "leads out")


def test_an_index_that_leads_out_is_refused(sharded: Path) -> None:
    shutil.move(sharded / INDEX, sharded.parent / "index")
    (sharded / INDEX).symlink_to(sharded.parent / "index")
    assert_refused(sharded, INDEX, "leads out")


def test_a_shard_that_leads_out_is_refused(sharded: Path) -> None:
    shutil.move(sharded / SHARDS[1], sharded.parent / "shard")
    (sharded / SHARDS[1]).symlink_to("../shard")
    assert_refused(sharded, SHARDS[1], "leads out")


def test_a_directory_that_leads_out_is_refused(model: Path) -> None:
    (model / "assets").symlink_to("/etc")
    assert_refused(model, "assets", "leads out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "assets"])
def test_a_link_to_itself_is_refused_or_left_behind(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(name)
    try:
        inspection = surgery.inspect(model)
    except surgery.CheckpointError as error:
        assert str(model) in str(error)
    else:
        assert name not in inspection.checkpoint.sides.copied


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_nothing_is_refused(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("nothing")
    assert_refused(model, str(model))


def test_a_directory_that_links_to_its_parent_does_not_go_on_for_ever(model: Path) -> None:
    (model / "again").symlink_to(".")
    assert all("again" not in name for name in surgery.inspect(model).checkpoint.sides.copied)


def test_a_side_file_whose_name_is_no_text_is_refused(model: Path) -> None:
    Path(os.fsdecode(os.fsencode(model) + b"/\xff.txt")).write_text("x")
    assert_refused(model, str(model))


def test_a_pipe_beside_the_weights_is_refused(model: Path) -> None:
    os.mkfifo(model / "pipe")
    assert_refused(model, "pipe")
