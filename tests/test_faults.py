"""Kill, stop, corrupt, fill the disk: OUT is whole or absent, and the message says what happened."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.write import target

NUM_TENSORS = 120
PATIENCE = 60  # seconds until a run that does not come to the point is given up
CAST = {"op": "tensor.cast", "tensors": ".*", "dtype": "float16"}
SPEC = {"edits": [CAST], "output": {"shard_size": "8KiB"}}
NF4 = {"op": "quantize.nf4", "modules": "all-linear"}
SINGLE = {**NF4, "double_quant": False}


def checkpoint(path: Path, tensors: dict[str, Tensor], model_type: str = "llama") -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (path / "tokenizer.json").write_text("{}")
    return path


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{index:03}.weight": torch.randn(64, 64, generator=generator) for index in range(NUM_TENSORS)}


def plan_of(source: Path, *edits: dict[str, Any]) -> Any:
    return surgery.plan({"version": 1, "source": str(source), **SPEC, **({"edits": list(edits)} if edits else {})})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that becomes many shards, each of them synced, so that a run can be met in its middle."""
    return checkpoint(tmp_path_factory.mktemp("faults") / "source", weights())


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = source.parent / "whole"
    surgery.apply(plan_of(source), out)
    return bytes_of(out)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.surgery-partial")


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


# Runs that are stopped


def heed_ctrl_c() -> None:
    """What runs in the background of a shell without jobs ignores it, and all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """`surgery apply` in a process of its own."""

    def __init__(self, source: Path, out: Path, *options: str) -> None:
        spec = out.parent / "spec.yaml"
        spec.write_text(json.dumps({"version": 1, "source": str(source), **SPEC}))
        command = [sys.executable, "-m", "surgery", "apply", str(spec), "-o", str(out), *options]
        self.out = out
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
        )

    def wait_for(self, num_shards: int) -> None:
        """Until so many shards have been begun."""
        end = time.monotonic() + PATIENCE
        while len(list(partial(self.out).glob("output/*.safetensors"))) < num_shards:
            assert self.process.poll() is None, f"it ended before: {self.process.communicate()}"
            assert time.monotonic() < end, "it does not come to the point"
            time.sleep(0.0005)

    def stop(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, stderr


@pytest.fixture
def start(source: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*options: str) -> Run:
        runs.append(Run(source, tmp_path / "out", *options))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.communicate()


@pytest.mark.parametrize("num_shards", [1, 10, NUM_TENSORS // 2, NUM_TENSORS - 2])
def test_a_killed_run_leaves_nothing_and_resumes_to_the_same_bytes(
    num_shards: int, start: Callable[..., Run], source: Path, whole: dict[str, bytes]
) -> None:
    run = start()
    run.wait_for(num_shards)
    assert run.stop(signal.SIGKILL) == (-signal.SIGKILL, "")
    assert not run.out.exists()
    seen: list[int] = []
    surgery.apply(plan_of(source), run.out, resume=True, report=lambda done, total: seen.append(done))
    assert bytes_of(run.out) == whole
    assert seen[0] >= (num_shards - 2) * 8192, "finished shards are done again"
    assert left_beside(run.out) == ["spec.yaml"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(
    number: int, start: Callable[..., Run], source: Path, whole: dict[str, bytes]
) -> None:
    run = start()
    run.wait_for(5)
    code, stderr = run.stop(number)
    assert code == 1
    assert (
        stderr
        == f"stopped: what is done is kept beside {run.out}, and the same command with --resume goes on from there\n"
    )
    assert not run.out.exists()
    code, stderr = start("--resume").stop(0)
    assert code == 0
    assert re.fullmatch(rf"going on where a run was stopped: .+ of .+ are written\nwrote {run.out}\n", stderr)
    assert bytes_of(run.out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stops_at_once_in_the_middle_of_a_long_decomposition(number: int, tmp_path: Path) -> None:
    """It takes many seconds, and nobody waits for it."""
    base = checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": torch.randn(3000, 3000)})
    tuned = checkpoint(tmp_path / "tuned", {"layers.0.q_proj.weight": torch.randn(3000, 3000)})
    extract = {"op": "adapter.extract", "modules": "all-linear", "models": "tuned", "rank": 8, "svd": "exact"}
    spec = {"version": 1, "source": str(base), "models": {"tuned": str(tuned)}, "edits": [extract]}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "surgery", "apply", str(tmp_path / "spec.yaml"), "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        end = time.monotonic() + PATIENCE
        while not (partial(tmp_path / "out") / "output").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(1)  # it is in the decomposition by now
        start = time.monotonic()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - start < 5
    assert process.returncode == 1
    assert stderr.startswith("stopped: what is done is kept")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_making_that_is_stopped_leaves_nothing(number: int, source: Path, tmp_path: Path) -> None:
    surgery.apply(plan_of(source), tmp_path / "out")
    options = ["--reproduce", "--source", str(source)]
    command = [sys.executable, "-m", "surgery", "verify", str(tmp_path / "out"), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        end = time.monotonic() + PATIENCE
        while not list(tmp_path.glob(".out.reproduce-*/.out.surgery-partial/output/*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == ("", "stopped\n")
    assert left_beside(tmp_path / "out") == []


def test_a_killed_run_leaves_the_old_output_as_it_was(start: Callable[..., Run], tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "precious").write_text("old")
    run = start("--overwrite")
    run.wait_for(10)
    run.stop(signal.SIGKILL)
    assert bytes_of(old) == {"precious": b"old"}


def test_two_runs_into_one_output_are_refused(start: Callable[..., Run], source: Path, whole: dict[str, bytes]) -> None:
    run = start()
    run.wait_for(2)
    run.process.send_signal(signal.SIGSTOP)
    for resume in (False, True):
        with pytest.raises(surgery.OutputError, match="is being written by another run"):
            surgery.apply(plan_of(source), run.out, resume=resume)
    run.process.send_signal(signal.SIGCONT)
    assert run.process.wait(PATIENCE) == 0
    assert bytes_of(run.out) == whole


# Runs that fail


class Failing:
    """A system call that fails with `number` from its call `at` on."""

    def __init__(self, call: Callable[..., Any], number: int, at: int) -> None:
        self.call, self.number, self.left = call, number, at

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.call(*arguments)


@pytest.fixture
def failed(source: Path, tmp_path: Path) -> Path:
    """The OUT of a run that a full disk ended after ten shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", Failing(os.pwrite, errno.ENOSPC, 21))
        with pytest.raises(surgery.OutputError):
            surgery.apply(plan_of(source), tmp_path / "out")
    return tmp_path / "out"


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(surgery.OutputError, match=r"has 1\.0 kB free, the output takes 1\.\d MB"):
        surgery.apply(plan_of(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(("call", "at"), [("pwrite", 0), ("pwrite", 1), ("pwrite", 51), ("fsync", 0), ("fsync", 40)])
def test_a_disk_that_fails_leaves_nothing_and_resumes_to_the_same_bytes(
    call: str, at: int, number: int, source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, Failing(getattr(os, call), number, at))
        with pytest.raises(surgery.OutputError) as caught:
            surgery.apply(plan_of(source), out)
    assert os.strerror(number) in str(caught.value) and str(out) in str(caught.value)
    assert "--resume" in str(caught.value)
    assert not out.exists()
    surgery.apply(plan_of(source), out, resume=True)
    assert bytes_of(out) == whole
    assert left_beside(out) == []


def test_a_disk_that_fails_at_the_very_end_leaves_nothing(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for call in ("rename", "replace"):
        out = tmp_path / call / "out"
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, Failing(getattr(os, call), errno.EIO, 0))
            try:
                surgery.apply(plan_of(source), out)
            except surgery.OutputError as error:
                assert os.strerror(errno.EIO) in str(error)
        if not out.exists():
            surgery.apply(plan_of(source), out, resume=True)
        assert bytes_of(out) == whole


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_the_same_plan_goes_on(resume: bool, failed: Path, source: Path, whole: dict[str, bytes]) -> None:
    seen: list[int] = []
    surgery.apply(plan_of(source), failed, resume=resume, report=lambda done, total: seen.append(done))
    assert seen[0] >= 8192
    assert bytes_of(failed) == whole


def test_without_resume_what_another_plan_left_is_thrown_away(
    failed: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = plan_of(source, {"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"})
    seen: list[int] = []
    surgery.apply(other, failed, report=lambda done, total: seen.append(done))
    assert seen[0] == 0
    assert "begins anew" in caplog.text and "the spec differs" in caplog.text
    surgery.apply(other, tmp_path / "fresh")
    assert bytes_of(failed) == bytes_of(tmp_path / "fresh")
    assert not partial(failed).exists()


def test_resume_is_refused_for_another_config(failed: Path, source: Path) -> None:
    config = source / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(before), "rms_norm_eps": 1e-5}))
        with pytest.raises(surgery.OutputError, match="the config of `source` differs"):
            surgery.apply(plan_of(source), failed, resume=True)
    finally:
        config.write_text(before)


@pytest.fixture
def half(source: Path, tmp_path: Path) -> tuple[Any, Path, dict[str, bytes]]:
    """A run that was stopped in the middle of its only shard: its plan, OUT, and what it would have written."""
    spec = {"version": 1, "source": str(source), "edits": [{**CAST, "dtype": "bfloat16"}]}
    plan = surgery.plan(spec)
    surgery.apply(plan, tmp_path / "whole")
    with pytest.raises(StopIteration):
        surgery.apply(plan, tmp_path / "out", workers=1, report=stop_at(500_000))
    return plan, tmp_path / "out", bytes_of(tmp_path / "whole")


def stop_at(num_bytes: int) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        del total
        if done >= num_bytes:
            raise StopIteration

    return report


def test_a_half_written_shard_is_gone_on_with_after_its_last_tensor(
    half: tuple[Any, Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, whole = half
    seen: list[int] = []
    read: list[int] = []
    preadv = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    surgery.apply(plan, out, report=lambda done, total: seen.append(done))
    assert bytes_of(out) == whole
    assert seen[0] >= 500_000 - 8192
    assert sum(read) <= 2 * (1_000_000 - seen[0]), "what was written already is read again"
    assert left_beside(out) == ["whole"]


@pytest.mark.parametrize("place", [0, 0.1, 0.49])
def test_a_tensor_that_was_damaged_meanwhile_is_written_again(
    place: float, half: tuple[Any, Path, dict[str, bytes]]
) -> None:
    plan, out, whole = half
    path = partial(out) / "output" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[int(place * 983_040)] ^= 1
    path.write_bytes(raw)
    surgery.apply(plan, out, resume=True)
    assert bytes_of(out) == whole


def test_what_does_not_belong_to_the_output_does_not_get_into_it(half: tuple[Any, Path, dict[str, bytes]]) -> None:
    plan, out, whole = half
    grown = partial(out) / "output"
    (grown / "model-00001-of-00002.safetensors").write_bytes(b"of a run before")
    (grown / "adapters" / "old").mkdir(parents=True)
    (grown / "adapters" / "old" / "adapter_config.json").write_text("{}")
    (grown / "elsewhere").symlink_to(out.parent)
    surgery.apply(plan, out, resume=True)
    assert bytes_of(out) == whole


def test_resume_is_refused_for_another_spec(failed: Path, source: Path, whole: dict[str, bytes]) -> None:
    other = plan_of(source, {"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"})
    with pytest.raises(surgery.OutputError, match="begun by another run: the spec differs") as caught:
        surgery.apply(other, failed, resume=True)
    assert "without --resume" in str(caught.value)
    assert not failed.exists()
    surgery.apply(plan_of(source), failed, resume=True)
    assert bytes_of(failed) == whole


def test_resume_is_refused_for_another_source(failed: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", {**weights(), "more": torch.ones(1)})
    with pytest.raises(surgery.OutputError, match=r"another run: `source` was sha256:[0-9a-f]+, and is sha256:"):
        surgery.apply(plan_of(other), failed, resume=True)


@pytest.mark.parametrize("package", ["surgery", "torch"])
def test_resume_is_refused_for_another_version(package: str, failed: Path, source: Path) -> None:
    journal = partial(failed) / "journal"
    first, _, rest = journal.read_bytes().partition(b"\n")
    entry = json.dumps({**json.loads(first.partition(b" ")[2]), package: "0.0.1"}).encode()
    journal.write_bytes(b"%08x %s\n" % (zlib.crc32(entry), entry) + rest)
    with pytest.raises(surgery.OutputError, match=f"the version of {package} differs, it was 0.0.1 and is"):
        surgery.apply(plan_of(source), failed, resume=True)
    assert partial(failed).exists()


@pytest.mark.parametrize("place", range(0, 2000, 90))
def test_a_bit_that_flips_in_the_journal_costs_work_and_no_more(
    place: int, failed: Path, source: Path, whole: dict[str, bytes]
) -> None:
    journal = partial(failed) / "journal"
    raw = bytearray(journal.read_bytes())
    raw[place % len(raw)] ^= 1 << place % 8
    journal.write_bytes(raw)
    surgery.apply(plan_of(source), failed)
    assert bytes_of(failed) == whole


@pytest.mark.parametrize("kind", ["garbage", "empty", "directory", "pipe", "unreadable", "gone"])
def test_a_journal_that_cannot_be_read_is_not_taken_for_nothing(
    kind: str, failed: Path, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run has not begun it does not throw away, unless it was told to begin anew."""
    journal = partial(failed) / "journal"
    shards = len(list((partial(failed) / "output").iterdir()))
    raw = journal.read_bytes()
    journal.unlink()
    if kind in ("garbage", "empty"):
        journal.write_bytes(b"garbage\n" if kind == "garbage" else b"")
    elif kind == "directory":
        journal.mkdir()
    elif kind == "pipe":
        os.mkfifo(journal)
    elif kind == "unreadable":
        journal.symlink_to(journal)
    if kind != "gone":
        with pytest.raises(surgery.OutputError, match="journal"):
            surgery.apply(plan_of(source), failed, resume=True)
        assert len(list((partial(failed) / "output").iterdir())) == shards
        shutil.rmtree(journal) if kind == "directory" else journal.unlink()
        journal.write_bytes(raw)
    surgery.apply(plan_of(source), failed, resume=True)
    assert bytes_of(failed) == whole


def test_pipes_and_links_in_the_way_of_a_run_are_neither_read_nor_followed(
    failed: Path, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first, second, third, *_ = sorted(partial(failed).glob("output/*.safetensors"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for path in (first, second, third):
        path.unlink()
    os.mkfifo(first)
    second.mkdir()
    third.symlink_to(victim)
    (partial(failed) / "journal-new").symlink_to(victim)
    surgery.apply(plan_of(source), failed, resume=True)
    assert bytes_of(failed) == whole and victim.read_text() == "precious"


def test_an_output_that_somebody_else_makes_meanwhile_is_not_replaced(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"

    def make(done: int, total: int) -> None:
        if done == total:
            out.mkdir(exist_ok=True)
            (out / "precious").write_text("of others")

    with pytest.raises(surgery.OutputError, match=os.strerror(errno.EEXIST)):
        surgery.apply(plan_of(source), out, report=make)
    assert [path.name for path in out.iterdir()] == ["precious"]
    shutil.rmtree(out)
    seen: list[int] = []
    surgery.apply(plan_of(source), out, report=lambda done, total: seen.append(done))
    assert bytes_of(out) == whole and len(seen) == 1, "the work was kept"


def test_resume_never_mixes_two_states_of_a_source(tmp_path: Path) -> None:
    """The header stays, the weights change: what was finished from the old ones must not go on."""
    tensors = weights()
    source = checkpoint(tmp_path / "source", tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", Failing(os.pwrite, errno.ENOSPC, 21))
        with pytest.raises(surgery.OutputError):
            surgery.apply(plan_of(source), tmp_path / "out")
    checkpoint(source, {name: -value for name, value in tensors.items()})
    surgery.apply(plan_of(source), tmp_path / "fresh")
    try:
        surgery.apply(plan_of(source), tmp_path / "out", resume=True)
    except surgery.OutputError:
        assert not (tmp_path / "out").exists()
    else:
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def test_weights_that_were_others_for_a_while_are_found_by_their_restored_time(tmp_path: Path) -> None:
    tensors = weights()
    source = checkpoint(tmp_path / "source", tensors)
    before = (source / "model.safetensors").stat()
    plan = plan_of(source)
    with pytest.raises(StopIteration):
        surgery.apply(plan, tmp_path / "out", report=stop_at(50_000))
    save_file({name: -value for name, value in tensors.items()}, source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(surgery.CheckpointError, match="has changed since it was planned"):
        surgery.apply(plan, tmp_path / "out")
    with pytest.raises(surgery.OutputError, match="the files of `source` are others, or were written to since"):
        surgery.apply(plan_of(source), tmp_path / "out", resume=True)


def test_resume_does_again_what_was_damaged_meanwhile(failed: Path, source: Path, whole: dict[str, bytes]) -> None:
    first, second, third, *_ = sorted(partial(failed).glob("output/*.safetensors"))
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    second.unlink()
    third.write_bytes(third.read_bytes()[:-5])
    surgery.apply(plan_of(source), failed, resume=True)
    assert bytes_of(failed) == whole


@pytest.mark.parametrize("cut", [1, 20, 200, 330])
def test_resume_takes_a_journal_that_was_cut_off(cut: int, failed: Path, source: Path, whole: dict[str, bytes]) -> None:
    journal = partial(failed) / "journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    surgery.apply(plan_of(source), failed, resume=True)
    assert bytes_of(failed) == whole


def test_resume_without_anything_to_resume_is_a_run(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    surgery.apply(plan_of(source), tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == whole


# Writing past the page cache

LARGE = {f"{name}.weight": torch.linspace(-1, 1, 700 * 612).reshape(700, 612) for name in "ab"} | {"c": torch.ones(5)}


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a file is, it is written a few blocks at a time."""
    monkeypatch.setattr(target, "SMALLEST_DIRECT", 0)
    monkeypatch.setattr(target, "GATHERED_BYTES", 4 * target.BLOCK_BYTES)


def refuse_direct_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *mode)

    original = os.open
    monkeypatch.setattr(os, "open", refuse)


def refuse_direct_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(fd, data, position)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", refuse)


def write_little_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: original(fd, data[:4096], position))


SYSTEMS = (lambda monkeypatch: None, refuse_direct_opening, refuse_direct_writing, write_little_at_once)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no such thing here")
@pytest.mark.parametrize("edit", [CAST, NF4, SINGLE], ids=["cast", "nf4", "nf4 without double_quant"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_bytes_are_the_same_past_the_page_cache(
    edit: dict[str, Any], system: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = checkpoint(tmp_path / "source", LARGE)
    surgery.apply(plan_of(source, edit), tmp_path / "plain")
    request.getfixturevalue("directly")
    with pytest.MonkeyPatch.context() as patch:
        system(patch)
        surgery.apply(plan_of(source, edit), tmp_path / "direct")
    assert bytes_of(tmp_path / "direct") == bytes_of(tmp_path / "plain")


@pytest.mark.parametrize("at", [0, 1, 40, 100])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fails_past_the_page_cache_leaves_nothing(
    call: str, at: int, directly: None, source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, Failing(getattr(os, call), errno.ENOSPC, at))
        with pytest.raises(surgery.OutputError, match=os.strerror(errno.ENOSPC)):
            surgery.apply(plan_of(source), out)
    assert not out.exists()
    surgery.apply(plan_of(source), out, resume=True)
    assert bytes_of(out) == whole


# Sources that fail


def test_a_source_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", weights())
    plan = plan_of(source)
    checkpoint(source, {name: -value for name, value in weights().items()})
    with pytest.raises(surgery.CheckpointError, match=r"has changed since it was planned(.|\n)*model\.safetensors"):
        surgery.apply(plan, tmp_path / "out")
    assert left_beside(source) == []


def test_a_source_that_vanished_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        source = checkpoint(tmp_path / "source", weights())
        plan = plan_of(source)
        (source / name).unlink()
        with pytest.raises(surgery.CheckpointError, match=name):
            surgery.apply(plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 400_000])
def test_a_source_that_is_truncated_while_it_is_read_is_refused(tmp_path: Path, keep: int) -> None:
    source = checkpoint(tmp_path / "source", weights())
    plan = plan_of(source)
    with pytest.raises(surgery.CheckpointError, match=r"model\.safetensors"):
        surgery.apply(
            plan,
            tmp_path / "out",
            memory=plan.cost.min_memory,
            report=lambda done, total: os.truncate(source / "model.safetensors", keep),
        )
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", weights())
    with pytest.raises(surgery.CheckpointError, match="has changed since it was planned"):
        surgery.apply(
            plan_of(source), tmp_path / "out", report=lambda done, total: os.utime(source / "model.safetensors")
        )
    assert not (tmp_path / "out").exists()


FP4 = {**NF4, "op": "quantize.fp4"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("edit", [NF4, SINGLE, FP4], ids=["nf4", "nf4 without double_quant", "fp4"])
@pytest.mark.parametrize("place", [(0, 0), (17, 5), (699, 599)])
def test_a_weight_that_no_block_can_hold_is_named_with_its_index(
    value: float, edit: dict[str, Any], place: tuple[int, int], tmp_path: Path
) -> None:
    tensors = {"a.weight": torch.ones(8, 64), "b.weight": torch.ones(700, 600, dtype=torch.bfloat16)}
    tensors["b.weight"][place] = value
    source = checkpoint(tmp_path / "source", tensors)
    with pytest.raises(surgery.OpError) as caught:
        surgery.apply(plan_of(source, edit), tmp_path / "out", workers=2)
    assert f"`b.weight` holds a value at [{place[0]}, {place[1]}] that is NaN or Inf" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [(0, 0), (3, 170), (63, 191)])
def test_a_weight_of_a_conv1d_is_named_where_it_is_on_disk(place: tuple[int, int], tmp_path: Path) -> None:
    weight = torch.ones(64, 192)
    weight[place] = float("nan")
    source = checkpoint(tmp_path / "source", {"h.0.attn.c_attn.weight": weight}, "gpt2")
    with pytest.raises(surgery.OpError) as caught:
        surgery.apply(plan_of(source, NF4), tmp_path / "out")
    assert f"`h.0.attn.c_attn.weight` holds a value at [{place[0]}, {place[1]}] that is NaN" in str(caught.value)


def test_a_weight_is_named_by_its_source_when_edits_went_before(tmp_path: Path) -> None:
    weight = torch.ones(700, 600)
    weight[650, 3] = float("nan")
    source = checkpoint(tmp_path / "source", {"old.weight": weight})
    edits = (
        {"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"},
        {"op": "tensor.rename", "tensors": "old(.*)", "to": r"new\1"},
        NF4,
    )
    with pytest.raises(surgery.OpError, match=r"`old\.weight` holds a value at \[650, 3\]"):
        surgery.apply(plan_of(source, *edits), tmp_path / "out")


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("float8_e5m2", -1e6), ("float8_e4m3fn", 1e3)])
def test_a_value_that_a_cast_cannot_hold_is_named_with_its_index(dtype: str, value: float, tmp_path: Path) -> None:
    weight = torch.ones(700, 600)
    weight[0, 0] = float("nan")
    if dtype != "float8_e4m3fn":  # which has no infinity
        weight[0, 1] = float("inf")
    weight[699, 3] = value
    source = checkpoint(tmp_path / "source", {"a.weight": weight})
    with pytest.raises(
        surgery.OpError, match=rf"`a\.weight` holds a value at \[699, 3\] that is too large for {dtype}"
    ):
        surgery.apply(plan_of(source, {"op": "tensor.cast", "tensors": ".*", "dtype": dtype}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_after_a_refused_weight_the_shards_before_it_are_kept(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.randn(64, 64) for name in "abcdef"}
    tensors["e.weight"][1, 2] = float("nan")
    source = checkpoint(tmp_path / "source", tensors)
    with pytest.raises(surgery.OpError, match=r"`e\.weight`"):
        surgery.apply(plan_of(source, {**NF4, "block_size": 32}), tmp_path / "out")
    assert left_beside(source) == [] or left_beside(source) == [".out.surgery-partial"]
    assert not (tmp_path / "out").exists()


# Places that cannot be written


def test_an_output_that_exists_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(surgery.OutputError, match=r"exists already(.|\n)*--overwrite"):
            surgery.apply(plan_of(source), tmp_path / name)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_overwrite_replaces_at_the_end_only(kind: str, source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("old")
    else:
        (tmp_path / "target").mkdir()
        out.symlink_to("target")
    (out if kind == "directory" else tmp_path / "target" if kind == "link" else tmp_path).joinpath("precious").touch()
    before = sorted(str(path) for path in tmp_path.rglob("*"))

    def look(done: int, total: int) -> None:
        assert sorted(str(path) for path in tmp_path.rglob("*") if partial(out) not in [path, *path.parents]) == before

    surgery.apply(plan_of(source), out, overwrite=True, report=look)
    assert not out.is_symlink() and bytes_of(out) == whole
    assert not partial(out).exists()
    assert kind != "link" or (tmp_path / "target" / "precious").exists()


def test_a_run_that_fails_keeps_the_old_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, errno.ENOSPC, 30))
    with pytest.raises(surgery.OutputError):
        surgery.apply(plan_of(source), out, overwrite=True)
    assert bytes_of(out) == {"precious": b"old"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["source", "source/.", "source/../source", "source/out", "source/a/b", ".", "link"])
def test_the_source_is_never_written(place: str, overwrite: bool, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    source = checkpoint(home / "source", {"a.weight": torch.ones(8, 8)})
    (home / "link").symlink_to("source")
    before = sorted(str(path) for path in home.rglob("*"))
    with pytest.raises(surgery.OutputError) as caught:
        surgery.apply(plan_of(source), home / place, overwrite=overwrite)
    assert "source" in str(caught.value) or "exists already" in str(caught.value)
    assert sorted(str(path) for path in home.rglob("*")) == before


def test_a_source_that_is_one_file_is_never_written(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    for place in ("model.safetensors", "."):
        with pytest.raises(surgery.OutputError):
            surgery.apply(plan_of(tmp_path / "model.safetensors"), tmp_path / place, overwrite=True)
    surgery.apply(plan_of(tmp_path / "model.safetensors"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out"]


def test_the_directory_one_is_in_is_not_replaced(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "here")
    with pytest.raises(surgery.OutputError, match="is where you are"):
        surgery.apply(plan_of(source), tmp_path / "out", overwrite=True)


def test_directories_on_the_way_are_made(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    surgery.apply(plan_of(source), tmp_path / "a" / "b" / "out")
    assert bytes_of(tmp_path / "a" / "b" / "out") == whole


def test_a_place_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(surgery.OutputError, match="file"):
        surgery.apply(plan_of(source), tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_to_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(surgery.OutputError, match="cannot be written to"):
        surgery.apply(plan_of(source), tmp_path / "locked" / "out")


def test_a_name_that_no_directory_can_have_is_refused(source: Path, tmp_path: Path) -> None:
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(surgery.OutputError):
            surgery.apply(plan_of(source), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_with_the_number_that_would_do(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    needed = -(-plan.cost.min_memory // (1 << 20))
    with pytest.raises(surgery.OutputError, match=rf"give --memory {needed}MiB or more"):
        surgery.apply(plan, tmp_path / "out", memory="1MiB")
    surgery.apply(plan, tmp_path / "out", memory=f"{needed}MiB")
