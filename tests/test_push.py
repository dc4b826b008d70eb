"""Outputs on the Hub: the true client against a Hub of our own on the loopback that takes what it sends."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import models
import pytest
import torch
import yaml
from hub import Answer, Hub, command, environment, files_of, git_oid, is_lfs
from peft import PeftModel
from safetensors.torch import save_file

import surgery
from surgery.card import make_card
from surgery.manifest import read_manifest

REPO = "me/pushed"
FIRST = "1" * 40
COMMIT = "c" * 40
TOKEN = "hf_one_that_may_write"
CARD = "---\nlicense: mit\nbase_model: org/other\n---\n# Tiny\n\nIts own text.\n"


class PushHub(Hub):
    """A Hub with one repository, which is made by the first push."""

    def __init__(self) -> None:
        super().__init__(REPO, {})
        self.RequestHandlerClass = PushAnswer
        self.private: bool | None = None
        self.refuses_to_make = 0  # the status
        self.ignored: tuple[str, ...] = ()
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []

    def make(self, *, private: bool = False, **files: bytes) -> None:
        self.private = private
        self.revisions |= {"main": FIRST, FIRST: FIRST}
        self.files[FIRST] = {".gitattributes": b"", **files}

    def head(self, branch: str = "main") -> dict[str, Any]:
        return self.files[self.revisions[branch]]


class PushAnswer(Answer):
    server: PushHub

    def do_POST(self) -> None:
        with self.counted():
            self.take(unquote(self.path.partition("?")[0]), self.body())

    def do_PUT(self) -> None:
        with self.counted():
            raw = self.body()
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(raw).hexdigest() == oid
            self.server.objects[oid] = raw
            self.send(200, b"", {})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def reply(self, content: object, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_api(self, repo: str, parts: list[str]) -> None:
        revision = "/".join(parts[1:]) or "main"
        if parts[:1] == ["tree"] or revision not in self.server.revisions:
            super().answer_api(repo, parts)
            return
        commit = self.server.revisions[revision]
        siblings = [{"rfilename": name} for name in self.server.files[commit]]
        self.reply({"id": repo, "sha": commit, "private": self.server.private, "siblings": siblings})

    def take(self, path: str, raw: bytes) -> None:
        hub = self.server
        if path == "/api/validate-yaml":
            self.reply({})
        elif path == "/api/repos/create":
            self.make(json.loads(raw))
        elif path.endswith("/info/lfs/objects/batch"):
            self.reply({"objects": [self.wanted(entry) for entry in json.loads(raw)["objects"]]})
        elif match := re.fullmatch(rf"/api/models/{REPO}/(preupload|commit|branch)/(.+)", path):
            verb, branch = match[1], match[2]
            if verb == "branch":
                hub.revisions[branch] = hub.revisions["main"]
                self.reply({})
            elif verb == "preupload":
                self.reply({"files": [self.mode(entry["path"], branch) for entry in json.loads(raw)["files"]]})
            else:
                self.commit_all([json.loads(line) for line in raw.splitlines()], branch)
        else:
            self.send(404, b"", {})

    def make(self, asked: dict[str, Any]) -> None:
        hub = self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid username or password."}, 401)
        elif hub.refuses_to_make:
            self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif hub.private is not None:
            self.reply({"error": "You already created this model repo", "url": f"{hub.endpoint}/{REPO}"}, 409)
        else:
            assert (asked["organization"], asked["name"]) == tuple(REPO.split("/"))
            hub.make(private=asked.get("visibility") == "private")
            self.reply({"url": f"{hub.endpoint}/{REPO}"})

    def mode(self, name: str, branch: str) -> dict[str, object]:
        there = self.server.head(branch).get(name)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if is_lfs(name) else git_oid(there)
        mode = "lfs" if is_lfs(name) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": name in self.server.ignored, "oid": oid}

    def wanted(self, entry: dict[str, Any]) -> dict[str, object]:
        href = f"http://localhost:{self.server.server_port}/put/{entry['oid']}"
        return {**entry, "actions": {"upload": {"href": href}}}

    def commit_all(self, lines: list[dict[str, Any]], branch: str) -> None:
        hub = self.server
        if lines[0]["value"]["parentCommit"] != hub.revisions[branch]:
            self.reply({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        files = dict(hub.head(branch))
        for line in lines[1:]:
            value = line["value"]
            is_file = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if is_file else hub.objects[value["oid"]]
        hub.commits.append(lines)
        commit = f"{len(hub.commits):040x}"
        hub.files[commit] = files
        hub.revisions |= {branch: commit, commit: commit}
        self.reply({"commitUrl": f"{hub.endpoint}/{REPO}/commit/{commit}", "commitOid": commit})


@pytest.fixture
def hub() -> Iterator[PushHub]:
    hub = PushHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit Llama from a Hub's repository, with a card of its own, and three adapters to train."""
    home = tmp_path_factory.mktemp("push")
    source = models.llama(home / "models--org--tiny" / "snapshots" / COMMIT)
    (source / "README.md").write_text(CARD)
    edits = [
        {"op": "quantize.nf4", "modules": "all-linear"},
        {"op": "attach.lora", "name": "low", "modules": r".*\.q_proj", "rank": 2, "alpha": 4},
        {"op": "attach.series_adapter", "name": "slots"},
        {"op": "attach.series_adapter", "name": "single", "modules": r".*\.v_proj", "placement": "after", "width": 4},
    ]
    spec = {"version": 1, "source": str(home / "models--org--tiny"), "edits": edits}
    surgery.apply(surgery.plan(spec), home / "out", device="cpu")
    return home / "out"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An output of a few bytes, made from a local source."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4)}, source / "model.safetensors")
    (source / "tokenizer.json").write_text("{}")
    edits = [{"op": "tensor.cast", "tensors": ".*", "dtype": "bfloat16"}]
    surgery.apply(surgery.plan({"version": 1, "source": str(source), "edits": edits}), tmp_path / "small")
    return tmp_path / "small"


def push(hub: Hub, out: Path, *arguments: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    known = {"HF_TOKEN": token} if token else {}
    return command(out.parent, hub, "push", out.name, REPO, *arguments, HF_HUB_DISABLE_XET="1", **known)


def card_of(raw: str) -> tuple[dict[str, Any], str]:
    _, front_matter, text = raw.split("---\n", 2)
    return yaml.safe_load(front_matter), text


def refusal(run: "subprocess.CompletedProcess[str]") -> str:
    assert (run.returncode, run.stdout) == (1, ""), run.stderr
    assert "Traceback" not in run.stderr and "  fix  " in run.stderr
    return run.stderr


# What goes up


def test_all_files_go_up_in_one_commit_with_a_card_and_the_output_stays_as_it_is(hub: PushHub, out: Path) -> None:
    before = files_of(out)
    run = push(hub, out)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{hub.endpoint}/{REPO}/commit/{1:040x}\n"
    assert len(hub.commits) == 1 and not hub.private
    there = hub.head()
    assert {name: raw for name, raw in there.items() if name not in ("README.md", ".gitattributes")} == {
        name: raw for name, raw in before.items() if name != "README.md"
    }
    assert files_of(out) == before
    assert there["README.md"].decode() == make_card(out, read_manifest(out), REPO)
    assert all(asked.token == "" for asked in hub.requests if asked.path.startswith("/put/"))


def downloaded(hub: PushHub, home: Path, revision: str = "main") -> Path:
    """The repository in a directory, by the Hub's client."""
    code = (
        f"from huggingface_hub import snapshot_download as d; d({REPO!r}, revision={revision!r}, local_dir='download')"
    )
    known = environment(home, hub, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="0")
    subprocess.run([sys.executable, "-c", code], cwd=home, env=known, check=True, timeout=120)
    return home / "download"


def test_a_download_verifies_with_its_card(hub: PushHub, small: Path, tmp_path: Path) -> None:
    assert push(hub, small).returncode == 0
    there = downloaded(hub, tmp_path)
    assert (there / ".gitattributes").exists() and not (small / "README.md").exists()
    run = command(tmp_path, hub, "verify", "download")
    assert (run.returncode, run.stdout.endswith(": as written; README.md is the card of its push\n")) == (0, True)
    assert surgery.verify(there).content == read_manifest(small).content


def test_a_download_whose_card_replaced_the_one_of_the_source_verifies(hub: PushHub, out: Path, tmp_path: Path) -> None:
    assert push(hub, out, "--revision", "v2").returncode == 0
    there = downloaded(hub, tmp_path, "v2")
    surgery.verify(there)
    (there / "README.md").write_bytes((out / "README.md").read_bytes())
    surgery.verify(there)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_card_that_was_edited_is_named(hub: PushHub, out: Path, small: Path, tmp_path: Path, replaces: bool) -> None:
    assert push(hub, out if replaces else small).returncode == 0
    there = downloaded(hub, tmp_path)
    card = (there / "README.md").read_text()
    for edited in (card + "Mine.\n", card.replace("tags:", "license: mit\ntags:"), "# Mine\n"):
        (there / "README.md").write_text(edited)
        with pytest.raises(surgery.VerifyError, match=r"`README\.md`") as caught:
            surgery.verify(there)
        assert len(caught.value.problems) == 1


def test_the_card_of_another_output_is_named(out: Path, small: Path) -> None:
    (small / "README.md").write_text(make_card(out, read_manifest(out), REPO))
    with pytest.raises(surgery.VerifyError, match=r"`README\.md` is not in the manifest"):
        surgery.verify(small)


def test_a_download_is_pushed_again_with_the_same_card(hub: PushHub, out: Path, tmp_path: Path) -> None:
    assert push(hub, out).returncode == 0
    there = downloaded(hub, tmp_path)
    assert make_card(there, read_manifest(there), REPO) == (there / "README.md").read_text()
    assert make_card(there, read_manifest(there), "me/other") == make_card(out, read_manifest(out), "me/other")


def test_the_same_again_makes_no_commit(hub: PushHub, small: Path) -> None:
    first, second = push(hub, small), push(hub, small)
    assert second.returncode == 0 and first.stdout == second.stdout
    assert len(hub.commits) == 1


def test_a_branch_is_made_and_the_card_names_it(hub: PushHub, out: Path) -> None:
    assert push(hub, out, "--revision", "v2", "--private").returncode == 0
    assert hub.private and "config.json" not in hub.head()
    assert f'from_pretrained("{REPO}", revision="v2")' in hub.head("v2")["README.md"].decode()


# The card


def test_the_card_says_what_was_done_from_what(out: Path) -> None:
    fields, text = card_of(make_card(out, read_manifest(out), REPO))
    assert fields == {
        "license": "mit",
        "library_name": "transformers",
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "tags": ["model-surgery", "4-bit", "bitsandbytes", "lora"],
    }
    spec = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert spec == read_manifest(out).content["spec"]
    assert f"[org/tiny](https://huggingface.co/org/tiny/tree/{COMMIT})" in text
    assert "bnb_4bit_quant_type: nf4" in text
    body, _, seal = text.rpartition("\n<!-- ")
    assert body.endswith("## README.md of the source\n\n# Tiny\n\nIts own text.\n")
    assert re.fullmatch(r"surgery card sha256:[0-9a-f]{64} -->\n", seal)


def loaded(code: str, out: Path, model: object) -> Any:
    """`model` after the card's code, with the repository in `out` instead of on the Hub."""
    download = "from huggingface_hub import snapshot_download"
    names = {"model": model, "snapshot_download": lambda path, allow_patterns: path}
    exec(code.replace(f'"{REPO}"', repr(str(out))).replace(download, "").replace("model = ...", ""), names)
    return names["model"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.parametrize("adapter", ["low", "slots", "single"])
def test_the_code_in_the_card_loads_the_model_and_each_adapter(out: Path, adapter: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", make_card(out, read_manifest(out), REPO), re.DOTALL)
    assert len(blocks) == 4
    (block,) = (block for block in blocks if f"adapters/{adapter}" in block)
    model = loaded(blocks[0], out, None)
    num_before = len(list(model.parameters()))
    theirs = "model.load_adapter("  # only a model of AdapterHub's library has it
    assert (theirs in block) == (adapter == "slots")
    model = loaded(block.replace(theirs, "# "), out, model)
    assert len(list(model.parameters())) > num_before
    assert isinstance(model, PeftModel) == (adapter == "low")


def test_a_local_source_is_no_base_model(small: Path) -> None:
    fields, text = card_of(make_card(small, read_manifest(small), REPO))
    assert fields == {"tags": ["model-surgery"]}
    assert "a local checkpoint, `sha256:" in text and "no configuration" in text


def test_a_merge_names_all_that_it_was_made_from(tmp_path: Path) -> None:
    for number, name in enumerate(("first", "second")):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / (f"{number}" * 40)
        snapshot.mkdir(parents=True)
        save_file({"a.weight": torch.full((4, 4), float(number))}, snapshot / "model.safetensors")
    edits = [{"op": "merge.linear", "models": {"source": {"weight": 0.5}, "other": {"weight": 0.5}}}]
    places = {
        "source": str(tmp_path / "models--org--first"),
        "models": {"other": str(tmp_path / "models--org--second")},
    }
    surgery.apply(surgery.plan({"version": 1, **places, "edits": edits}), tmp_path / "out")
    fields, text = card_of(make_card(tmp_path / "out", read_manifest(tmp_path / "out"), REPO))
    assert fields["base_model"] == ["org/first", "org/second"]
    assert (fields["base_model_relation"], fields["tags"]) == ("merge", ["model-surgery", "merge"])
    assert "| `other` | [org/second]" in text


def test_an_adapter_alone_is_one_of_its_base(tmp_path: Path) -> None:
    source = models.llama(tmp_path / "models--org--tiny" / "snapshots" / COMMIT)
    edits = [{"op": "attach.lora", "name": "low", "modules": r".*\.q_proj"}]
    spec = {"version": 1, "source": str(source.parents[1]), "edits": edits}
    out = tmp_path / "out"
    surgery.apply(surgery.plan(spec), out)
    fields, text = card_of(make_card(out, read_manifest(out), REPO))
    assert fields["library_name"] == "peft"
    assert (fields["base_model"], fields["base_model_relation"]) == ("org/tiny", "adapter")
    assert "model = ...  # org/tiny" in text and 'subfolder="adapters/low"' in text


# What is refused


@pytest.mark.parametrize("repo", ["pushed", "me/pushed/more", "me/pu shed", "me/--pushed"])
def test_a_name_that_is_none_is_refused(small: Path, repo: str) -> None:
    with pytest.raises(surgery.OutputError, match="is no repository on the Hub") as caught:
        surgery.push(small, repo)
    assert caught.value.problems[0].at == repo and "org/name" in caught.value.problems[0].fix


def test_what_does_not_verify_is_not_pushed(small: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.VerifyError, match="has no manifest"):
        surgery.push(tmp_path / "source", REPO)
    (small / "tokenizer.json").write_text("[]")
    with pytest.raises(surgery.VerifyError, match=r"`tokenizer\.json` differs"):
        surgery.push(small, REPO)


def test_without_a_token_or_a_right_it_says_how_to_get_in(hub: PushHub, small: Path) -> None:
    assert "hf auth login" in refusal(push(hub, small, token=""))
    hub.refuses_to_make = 403
    error = refusal(push(hub, small))
    assert "rights" in error and "hf auth login" in error
    assert not hub.commits


def test_weights_of_another_output_do_not_stay_beside_it(hub: PushHub, small: Path) -> None:
    hub.make(**{"model.safetensors.index.json": b"{}", "notes.md": b""})
    assert "may take: model.safetensors.index.json" in refusal(push(hub, small))
    assert not hub.commits and not hub.objects


def test_private_is_not_granted_by_a_public_repository(hub: PushHub, small: Path) -> None:
    hub.make()
    assert "is public already" in refusal(push(hub, small, "--private"))
    assert not hub.commits


def test_a_file_that_the_hub_ignores_is_missed(hub: PushHub, small: Path) -> None:
    hub.ignored = ("tokenizer.json",)
    error = refusal(push(hub, small))
    assert "has no `tokenizer.json` in its commit" in error and ".gitignore" in error


def test_a_hub_that_is_not_there_is_named(hub: PushHub, small: Path) -> None:
    run = command(
        small.parent, hub, "push", small.name, REPO, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN
    )  # fmt: skip
    assert "HF_ENDPOINT" in refusal(run)
