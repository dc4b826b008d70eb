"""The verbs: `load`, `plan`, `apply`, `verify`, and what each command of the command line calls."""

from __future__ import annotations

import difflib
import inspect as python_inspect
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.config_only import open_config
from surgery.cost import DEFAULT_MEMORY
from surgery.errors import OutputError, Problem, SpecError, SurgeryError, VerifyError
from surgery.inspection import Inspection, inspect_checkpoint
from surgery.op import SOURCE, find_op, op_names, options_of
from surgery.plan import Plan, make_plan
from surgery.sizes import parse_size
from surgery.spec import Spec, load_spec, spec_schema
from surgery.workplace import Workplace, temporary_directory

if TYPE_CHECKING:
    from surgery.comparison import Comparison
    from surgery.manifest import Manifest
    from surgery.stream import Resources
    from surgery.write import ProgressReport

__all__ = [
    "apply",
    "diff",
    "import_mergekit",
    "inspect",
    "load",
    "ops",
    "plan",
    "push",
    "resumable",
    "schema",
    "validate",
    "verify",
]

KIND_NAMES = {"object": "map", "array": "list"}
Setting = str | int | float | bool | None


def load(spec: str | Path | Mapping[str, object], **params: Setting) -> Spec:
    """Read and check a spec.

    `spec` is a YAML file, the name of a recipe that comes with surgery (`nf4`), or the same as plain
    data; `params` override its parameters. Raises SpecError with every problem found, each with its line.
    """
    return load_spec(spec, params)


def validate(specs: str | Path | Iterable[str | Path], **params: Setting) -> list[Spec]:
    """Check one or several specs without opening any source. Raises SpecError with the problems of all of them."""
    loaded: list[Spec] = []
    problems: list[Problem] = []
    for spec in [specs] if isinstance(specs, str | Path) else specs:
        try:
            loaded.append(load_spec(spec, params))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(*problems)
    return loaded


def plan(
    spec: Spec | str | Path | Mapping[str, object],
    *,
    config_only: bool = False,
    download: bool = False,
    **params: Setting,
) -> Plan:
    """What applying `spec` would do, from headers alone; `print` it to see.

    With `config_only` from the models' config.json alone, for which no weights need to be there; such a plan
    cannot be applied. What is on the Hub is read there, range by range; with `download` it is fetched first, and
    kept in the cache of the Hub's client. Raises SpecError, OpError or CheckpointError with what is wrong, where, and
    how to mend it.
    """
    loaded = spec if isinstance(spec, Spec) else load_spec(spec, params)
    sources = {SOURCE: loaded.source, **loaded.models}
    opened = open_config if config_only else partial(open_checkpoint, download=download)
    return make_plan(loaded, {name: opened(source) for name, source in sources.items()})


def apply(
    plan: Plan,
    out: str | Path,
    *,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    hash_sources: bool = False,
    report: ProgressReport | None = None,
) -> Manifest:
    """Do what `plan` says: write OUT with its manifest, whole or not at all.

    `memory` bounds what is held beyond the imports (bytes, or `2GiB`); `workers` are compute threads
    (default: one for each core); `device` is `auto`, `cpu`, `cuda` or `cuda:N`; none of them changes a
    byte of the output. A run goes on where one of the same plan into OUT was stopped; with `resume` what one of
    another plan left is refused, else it is thrown away. `hash_sources` notes the
    sha256 of every source file in the manifest, as is done anyway of a base that an adapter is, or was, extracted
    for. `report` is called with the bytes written so far and in all. Raises OutputError, OpError or CheckpointError.
    """
    from surgery.write import write_output

    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a Plan is applied, not a {type(plan).__name__}: surgery.apply(surgery.plan(spec), out)")
    if any(model.is_config_only for model in plan.checkpoints.values()):
        what = "the plan was made from config.json alone: there are no weights to apply it to"
        raise OutputError(Problem(what, fix="plan with the weights at hand, without config_only"))
    return write_output(
        plan,
        Path(out),
        _resources(memory, workers, device),
        overwrite=overwrite,
        resume=resume,
        hash_sources=hash_sources,
        report=report or (lambda done, total: None),
    )


def resumable(out: str | Path) -> bool:
    """Whether a run into `out` was stopped, and the next one goes on from there."""
    return Workplace(Path(out), overwrite=False).journal.exists()


def _resources(memory: str | int, workers: int | None, device: str) -> Resources:
    import torch

    from surgery.stream import Resources

    try:
        num_bytes = parse_size(memory)
    except ValueError as error:
        raise OutputError(Problem(f"--memory {error}")) from None
    if workers is not None and workers < 1:
        raise OutputError(Problem(f"--workers {workers}: at least one is needed"))
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise OutputError(Problem(f"--device {device} cannot be used: {first_line}", fix="give --device cpu")) from None
    return Resources(num_bytes, workers or len(os.sched_getaffinity(0)), chosen)


def verify(
    out: str | Path,
    *,
    reproduce: bool = False,
    source: str | None = None,
    models: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash `out` anew and hold it against its manifest; with `reproduce`, also make it again and compare.

    A manifest names what is local by its content only, so `reproduce` needs to be told where it is:
    `source`, and `models` by their names in the spec; what came from the Hub is known by its commit.
    Raises VerifyError naming each file and tensor that differs.
    """
    from surgery.verification import verify_output

    manifest = verify_output(Path(out))
    if reproduce:
        given = dict(models or {})
        if source is not None:
            given[SOURCE] = source
        _reproduce(manifest, Path(out), given)
    return manifest


def _reproduce(manifest: Manifest, out: Path, given: Mapping[str, str]) -> None:
    from surgery.verification import compare_manifests, has_source_hashes

    spec = cast("Mapping[str, object]", manifest.content["spec"])
    identities = {SOURCE: str(spec["source"]), **cast("Mapping[str, str]", spec.get("models", {}))}
    for name in given:
        if name not in identities:
            raise VerifyError(Problem(f"there is no model `{name}` in the manifest", str(out)))
    places = {name: _place(name, identity, given.get(name), out) for name, identity in identities.items()}
    models = {name: place for name, place in places.items() if name != SOURCE}
    again = plan({**spec, "source": places[SOURCE], **({"models": models} if models else {})})
    with temporary_directory(out.resolve().parent, f".{out.name}.reproduce-") as scratch:
        made = apply(again, scratch / "out", hash_sources=has_source_hashes(manifest))
        compare_manifests(manifest, made)


def _place(name: str, identity: str, given: str | None, out: Path) -> str:
    """Where the source, or the model `name`, is now. Raises VerifyError if that is not what it was."""
    option = "--source PATH" if name == SOURCE else f"--model {name}=PATH"
    if given is None and identity.startswith("sha256:"):
        what = "was made from a local source, which the manifest does not locate"
        raise VerifyError(Problem(what, str(out), f"say where it is: `surgery verify OUT --reproduce {option}`"))
    if given is None:
        return identity  # a repository at its commit
    found = open_checkpoint(given).identity
    if found != identity:
        what = f"is not what the output was made from: it is {found}, that was {identity}"
        raise VerifyError(Problem(what, given, "give the source of that run"))
    return given


def push(out: str | Path, repo: str, *, private: bool = False, revision: str = "") -> str:
    """Verify `out` and commit it, with a model card, to the Hub's `repo` (org/name), by the Hub's client.

    The repository is made if it is not there (`private` if asked), and so is the branch `revision`; OUT stays as it
    is. Gives the URL of the commit. Raises VerifyError or OutputError.
    """
    from surgery.pushing import push_output

    return push_output(Path(out), repo, private=private, revision=revision)


def inspect(source: str | Path) -> Inspection:
    """What a checkpoint is, from its headers: module tree, types, sizes, what it is quantized with."""
    return inspect_checkpoint(open_checkpoint(str(source)))


def diff(
    a: str | Path,
    b: str | Path,
    *,
    memory: str | int = DEFAULT_MEMORY,
    workers: int | None = None,
    report: ProgressReport | None = None,
) -> Comparison:
    """What checkpoint `b` is to checkpoint `a`: tensors added, dropped and changed, and how far apart they are.

    4-bit weights are compared as what a loader makes of them. `memory` and `workers` are as for `apply`; `report` is
    called with the bytes compared so far and in all. Raises CheckpointError, or OpError for a 4-bit weight that does
    not hold together.
    """
    from surgery.comparison.compare import compare

    first, second = open_checkpoint(str(a)), open_checkpoint(str(b))
    return compare(first, second, _resources(memory, workers, "cpu"), report or (lambda done, total: None))


def import_mergekit(config: str | Path) -> str:
    """A mergekit configuration file as a spec, YAML text. Raises SpecError for what has no equal here."""
    from surgery.importing import from_mergekit
    from surgery.spec.document import read_document

    return from_mergekit(read_document(Path(config)))


def ops(name: str | None = None) -> str:
    """The ops with a line each, or the manual of one. Raises SurgeryError for a name that is none."""
    if name is None:
        width = max(map(len, op_names()))
        return "\n".join(f"{op:{width}}  {_manual(op).splitlines()[0]}" for op in op_names())
    if name not in op_names():
        near = difflib.get_close_matches(name, op_names(), 1, 0.4)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise SurgeryError(Problem(f"there is no op `{name}`", fix=f"{hint}The ops are {', '.join(op_names())}"))
    return f"{name}\n\n{_manual(name)}\n\n{_options(name)}"


def _manual(name: str) -> str:
    return python_inspect.cleandoc(find_op(name).__doc__ or "")


def _options(name: str) -> str:
    op = find_op(name)
    lines = ["Fields"]
    if op.selects != "checkpoint":
        optional = f"; default all {op.selects}" if op.selects_all else ""
        lines += [f"  {op.selects}, except, expect", f"      what it is applied to{optional}"]
    for option in options_of(op):
        default = "required" if option.required else f"default {option.default}"
        shown = _kind(option.schema)
        lines += [f"  {option.key}  ({shown}; {default})", f"      {option.doc}"]
    return "\n".join(lines)


def _kind(schema: Mapping[str, object]) -> str:
    """What a value may be, in a few words."""
    if "anyOf" in schema:
        kinds = [_kind(choice) for choice in cast("list[Mapping[str, object]]", schema["anyOf"])]
        return " or ".join(dict.fromkeys(kinds))
    kind = schema.get("enum") or schema.get("type")
    names = [str(name) for name in cast("list[object]", kind)] if isinstance(kind, list) else [str(kind)]
    return ", ".join(KIND_NAMES.get(name, name) for name in names)


def schema() -> dict[str, object]:
    """The JSON Schema of the spec, generated from the ops."""
    return spec_schema()
