"""The model card of an output: what was done, from what, how to load it; all of it from the manifest and the configs.

Why nothing is asked of the Hub: the same output gives the same card, and what the card says was verified with OUT.

Why a seal: a download holds the card where OUT had no README.md, or the source's. The card ends with the digest of
itself and of the manifest's seal, so that one made by any version of surgery is known again, and an edited one is not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

import yaml

from surgery.checkpoint import ADAPTER_CONFIG, CONFIG
from surgery.checkpoint.home import Directory, read_json
from surgery.manifest import MANIFEST_NAME, SEAL, Manifest
from surgery.op import SOURCE
from surgery.sizes import format_decimal

__all__ = ["CARD_NAME", "has_card", "make_card"]

CARD_NAME = "README.md"
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([0-9a-f]{40}))?", re.ASCII)
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?\n)??---[ \t]*(?:\r?\n|$)", re.DOTALL)
KEPT = ("license", "license_name", "license_link", "language")  # of the old card: they hold for what is made of it
ADAPTER = re.compile(r"adapters/[\w.-]+")  # its name goes into code
OLD_CARD = "README.md of the source"
SEALED = re.compile(rb"(?P<card>.*)\n<!-- surgery card sha256:(?P<seal>[0-9a-f]{64}) -->\n", re.DOTALL)
MAX_CARD_BYTES = 1 << 26
CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LIBRARIES = {"peft": "peft", "adapterhub": "adapter-transformers", "transformers": "transformers"}


@dataclass(frozen=True, slots=True)
class _Part:
    """What one loader opens: the checkpoint or an adapter, in `directory` of the output ("" is its top)."""

    directory: str
    loader: str  # transformers, peft, adapterhub, surgery; empty for tensors that nothing more is known of
    config: Mapping[str, object]


def make_card(out: Path, manifest: Manifest, repo: str, revision: str = "") -> str:
    """README.md of `repo` for the verified output in `out`: front matter, text and seal."""
    parts = list(_parts(out, manifest))
    old_fields, old_text = _old_card(out, manifest)
    fields = {**old_fields, **_metadata(manifest, parts)}
    sections = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---",
        f"# {repo.rpartition('/')[2]}",
        "Made with `surgery`: edits of safetensors checkpoints, declared in YAML and applied as a stream.",
        *_sections("What was done", _edits(manifest)),
        *_sections("From what", _origins(manifest)),
        *_sections("How to load it", "\n\n".join(_loading(part, parts, manifest, repo, revision) for part in parts)),
        *_sections("Quantization", _quantization(parts)),
        *_sections("Evidence", _evidence(manifest)),
        *_sections(OLD_CARD, old_text),
    ]
    card = "\n\n".join(sections) + "\n"
    return f"{card}\n<!-- surgery card sha256:{_seal(card.encode(), manifest)} -->\n"


def has_card(out: Path, manifest: Manifest) -> bool:
    """Whether README.md in `out` is a card that was made for the output of `manifest`, unchanged."""
    return _sealed(out, manifest) is not None


def _sealed(out: Path, manifest: Manifest) -> bytes | None:
    """The card in `out` without its seal; None if README.md is none for `manifest`, or was edited."""
    path = out / CARD_NAME
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return None
    match = SEALED.fullmatch(path.read_bytes())
    if match is None or match["seal"].decode() != _seal(match["card"], manifest):
        return None
    return match["card"]


def _seal(card: bytes, manifest: Manifest) -> str:
    return hashlib.sha256(f"{manifest.content[SEAL]}\n".encode() + card).hexdigest()


def _sections(heading: str, text: str) -> list[str]:
    return [f"## {heading}", text] if text else []


# What is in the output


def _parts(out: Path, manifest: Manifest) -> Iterator[_Part]:
    """The checkpoint first, then the adapters; of what was written, not of what came along from the source."""
    directories = {PurePosixPath(str(entry["file"])).parent.as_posix() for entry in manifest.tensors.values()}
    if "." in directories:
        yield _top(out, {file.name for file in manifest.files})
    for directory in sorted(directories):
        if ADAPTER.fullmatch(directory):
            yield _adapter(out, directory)


def _top(out: Path, names: set[str]) -> _Part:
    if ADAPTER_CONFIG in names:
        return _adapter(out, "")
    config = read_json(Directory(out), CONFIG) if CONFIG in names else {}
    return _Part("", "transformers" if config.get("model_type") else "", config)


def _adapter(out: Path, directory: str) -> _Part:
    config = read_json(Directory(out / directory), ADAPTER_CONFIG)
    if "peft_type" in config:
        return _Part(directory, "peft", config)
    return _Part(directory, "surgery" if config.get("adapter_type") == "surgery" else "adapterhub", config)


def _ops(manifest: Manifest) -> list[str]:
    spec = cast("Mapping[str, object]", manifest.content["spec"])
    return [str(edit["op"]) for edit in cast("list[Mapping[str, object]]", spec.get("edits", []))]


# Metadata


def _metadata(manifest: Manifest, parts: list[_Part]) -> dict[str, object]:
    fields: dict[str, object] = {}
    library = next((LIBRARIES[part.loader] for part in parts if part.loader in LIBRARIES), None)
    if library:
        fields["library_name"] = library
    bases = _bases(manifest, parts)
    if bases:
        fields["base_model"] = bases[0] if len(bases) == 1 else bases
        fields["base_model_relation"] = _relation(manifest, parts)
    return {**fields, "tags": _tags(manifest, parts)}


def _bases(manifest: Manifest, parts: list[_Part]) -> list[str]:
    """Hub ids without commits: of an adapter its base's, of a checkpoint those of all that it was made from."""
    if _is_adapter(parts):
        named = str(parts[0].config.get("base_model_name_or_path") or parts[0].config.get("model_name") or "")
        base = cast("Mapping[str, object]", manifest.content.get("base", {}))
        is_attached = bool(parts[0].directory)
        identities = [str(base.get("identity", "")), named, *([_source(manifest)] if is_attached else [])]
        found = [match[1] for identity in identities if (match := HUB_ID.fullmatch(identity))]
        return found[:1]
    identities = [str(model["identity"]) for model in manifest.models.values()]
    return list(dict.fromkeys(match[1] for item in identities if (match := HUB_ID.fullmatch(item))))


def _source(manifest: Manifest) -> str:
    return str(manifest.models[SOURCE]["identity"])


def _is_adapter(parts: list[_Part]) -> bool:
    return bool(parts) and parts[0].loader in ("peft", "adapterhub", "surgery")


def _relation(manifest: Manifest, parts: list[_Part]) -> str:
    if _is_adapter(parts):
        return "adapter"
    if len(manifest.models) > 1:
        return "merge"
    return "quantized" if any(op in ("quantize.nf4", "quantize.fp4") for op in _ops(manifest)) else "finetune"


def _tags(manifest: Manifest, parts: list[_Part]) -> list[str]:
    tags = ["model-surgery"]
    if any(op.startswith("merge.") for op in _ops(manifest)):
        tags.append("merge")
    for part in parts:
        entry = _quantization_config(part)
        tags += ["4-bit", "bitsandbytes"] if entry.get("load_in_4bit") else []
        tags += [str(part.config["peft_type"]).lower()] if part.loader == "peft" else []
    return list(dict.fromkeys(tags))


# Sections


def _edits(manifest: Manifest) -> str:
    spec = yaml.safe_dump(manifest.content["spec"], sort_keys=False, allow_unicode=True, width=120)
    return f"The spec, its parameters replaced:\n\n{_fenced('yaml', spec)}"


def _fenced(language: str, text: str) -> str:
    """A code block that no line of `text` ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _origins(manifest: Manifest) -> str:
    rows = [(name, str(model["identity"])) for name, model in manifest.models.items()]
    base = cast("Mapping[str, object] | None", manifest.content.get("base"))
    rows += [("base", str(base["identity"]))] if base and str(base["identity"]) != rows[0][1] else []
    lines = [f"| `{name}` | {_origin(identity)} |" for name, identity in rows]
    return "\n".join(["| model | was |", "|---|---|", *lines])


def _origin(identity: str) -> str:
    match = HUB_ID.fullmatch(identity)
    if match:
        return f"[{match[1]}](https://huggingface.co/{match[1]}/tree/{match[2] or 'main'}) at `{match[2] or 'main'}`"
    return f"a local checkpoint, `{identity}` (of its names and headers)"


def _loading(part: _Part, parts: list[_Part], manifest: Manifest, repo: str, revision: str) -> str:
    if part.loader == "transformers":
        return _fenced("python", _model_code(part.config, repo, revision))
    if part.loader == "":
        return "The tensors are in safetensors files; the output has no configuration that names a model."
    return f"{_title(part)}\n\n{_fenced('python', _adapter_code(part, parts, manifest, repo, revision))}"


def _title(part: _Part) -> str:
    names = {"peft": "PEFT", "adapterhub": "AdapterHub's layout", "surgery": "`surgery.runtime`"}
    which = f"`{part.directory}`" if part.directory else "The adapter"
    return f"{which}, with {names[part.loader]}:"


def _model_code(config: Mapping[str, object], repo: str, revision: str) -> str:
    name, trusted = "AutoModel", ""
    architectures = config.get("architectures")
    named = str(cast("list[object]", architectures)[0]) if isinstance(architectures, list) and architectures else ""
    if isinstance(auto := config.get("auto_map"), Mapping):
        classes = [str(key) for key in cast("Mapping[object, object]", auto) if str(key).startswith("AutoModel")]
        named, trusted = (classes[-1] if classes else "AutoModel"), ", trust_remote_code=True"
    if CLASS.fullmatch(named):
        name = named
    lines = [f"from transformers import {name}", "", f"model = {name}.from_pretrained({_at(repo, revision)}{trusted})"]
    return "\n".join(lines)


def _at(repo: str, revision: str) -> str:
    return f'"{repo}"' + (f', revision="{revision}"' if revision else "")


def _adapter_code(part: _Part, parts: list[_Part], manifest: Manifest, repo: str, revision: str) -> str:
    model = f"model = ...  # {_base_code(part, parts, manifest)}"
    if part.loader == "peft":
        folder = f', subfolder="{part.directory}"' if part.directory else ""
        load = f"model = PeftModel.from_pretrained(model, {_at(repo, revision)}{folder})"
        return "\n".join(["from peft import PeftModel", "", model, load])
    patterns = f', allow_patterns="{part.directory}/*"' if part.directory else ""
    download = f"path = snapshot_download({_at(repo, revision)}{patterns})"
    path = f'path + "/{part.directory}"' if part.directory else "path"
    return "\n".join(["from huggingface_hub import snapshot_download", "", model, download, *_attaching(part, path)])


def _attaching(part: _Part, path: str) -> list[str]:
    """What is said of the model to have the adapter in `path` on it."""
    ours = ["from surgery import runtime", f"runtime.attach(model, {path})"]
    theirs = [f"model.load_adapter({path}, use_safetensors=True, set_active=True)"]
    if part.loader == "surgery":
        return ours
    inner = part.config.get("config")
    if not isinstance(inner, Mapping) or "reduction_factor" not in inner:  # no bottleneck
        return theirs
    return ["# with AdapterHub's library", *theirs, "# or with any transformers", *ours]


def _base_code(part: _Part, parts: list[_Part], manifest: Manifest) -> str:
    """What the adapter goes on, in words."""
    if part.directory and not parts[0].directory:
        return "that of this repository, loaded as above"
    bases = _bases(manifest, [part])
    return f"{bases[0]}, loaded as its own card says" if bases else "the base, a local checkpoint: see above"


def _quantization_config(part: _Part) -> Mapping[str, object]:
    entry = part.config.get("quantization_config")
    return cast("Mapping[str, object]", entry) if isinstance(entry, Mapping) else {}


def _quantization(parts: list[_Part]) -> str:
    entry: Mapping[str, object] = _quantization_config(parts[0]) if parts else {}
    if not entry:
        return ""
    need = " Loading needs `bitsandbytes`." if entry.get("quant_method") == "bitsandbytes" else ""
    shown = yaml.safe_dump(dict(entry), sort_keys=False, allow_unicode=True)
    return f"As `{CONFIG}` has it.{need}\n\n{_fenced('yaml', shown)}"


def _evidence(manifest: Manifest) -> str:
    num_bytes = sum(file.num_bytes for file in manifest.files)
    errors = [
        (cast("Mapping[str, float]", entry["error"])["max"], name)
        for name, entry in manifest.tensors.items()
        if "error" in entry
    ]
    worst = (
        f" The largest error of a rounded tensor is {max(errors)[0]:.3g}, in {_quoted(max(errors)[1])}."
        if errors
        else ""
    )
    replaced = CARD_NAME in {file.name for file in manifest.files}
    itself = "there, README.md is the source's, which this card replaces" if replaced else "this card is not in it"
    return (
        f"{len(manifest.files)} files, {len(manifest.tensors)} tensors, {format_decimal(num_bytes)}."
        f"{worst} `{MANIFEST_NAME}` has the sha256 of every file and tensor, and where each tensor "
        f"comes from; {itself}."
    )


def _quoted(name: str) -> str:
    """A name that is to stand in a line."""
    return f"`{name}`" if name.isprintable() and "`" not in name else "one of another name"


# The card that was there


def _old_card(out: Path, manifest: Manifest) -> tuple[dict[str, object], str]:
    """What still holds of the source's README.md, and its text without front matter."""
    if CARD_NAME not in {file.name for file in manifest.files}:
        return {}, ""
    card = _sealed(out, manifest)
    text = (card or (out / CARD_NAME).read_bytes()).decode(errors="replace")
    match = FRONT_MATTER.match(text)
    fields = _kept(match[1] or "") if match else {}
    if card is not None:  # of an earlier push: the source's is in it
        return fields, text.partition(f"\n## {OLD_CARD}\n")[2].strip()
    return fields, text[match.end() if match else 0 :].strip()


def _kept(front_matter: str) -> dict[str, object]:
    try:
        fields: object = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(fields, Mapping):
        return {}
    known = cast("Mapping[object, object]", fields)
    return {key: known[key] for key in KEPT if _is_plain(known.get(key))}


def _is_plain(value: object) -> bool:
    """A text, or a list of texts."""
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, str) for item in values)
