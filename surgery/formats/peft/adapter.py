"""`Adapter`: a PEFT adapter as patches on the tensors of its base.

A key is `base_model.model.` + the module's path when the model runs + what the method calls the tensor. What is left
over must be a tensor of the base under its own name: one that the adapter stores whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from surgery.checkpoint.architecture import Architecture
from surgery.checkpoint.home import read_json
from surgery.checkpoint.modules import Module
from surgery.errors import OpError, Problem
from surgery.formats.peft.base import Base, Inconsistent, Misfit, Target
from surgery.formats.peft.method import Change, Method, Part
from surgery.formats.peft.methods import METHODS, PROMPT_METHODS
from surgery.formats.peft.patch import Patch, Replacement
from surgery.formats.peft.settings import Settings
from surgery.formats.peft.ties import Tied, tied_patches
from surgery.formats.peft.tokens import TOKEN_SUFFIXES, TOKENS, token_change
from surgery.graph import Node
from surgery.op import Model
from surgery.types import TensorType

__all__ = ["Adapter", "read_adapter", "refuse_other_base"]

MANIFEST = "surgery-manifest.json"

PREFIX = "base_model."
INNER_PREFIX = "base_model.model."
WRAPPED = ".base_layer"
WRAPPER = re.compile(  # of a module as it was before training, and as it was trained
    r"\.((?P<before>(token_adapter\.)?base_layer|original_module)|modules_to_save(\.default)?)(?=\.)"
)
SHOWN = 3  # names of a kind in one message


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter, read but not yet held against a base."""

    name: str
    settings: Settings
    method: Method
    parts: Mapping[str, tuple[Part, ...]]  # by module path; fused experts have one for each weight
    shared: Mapping[str, Node]
    whole: Mapping[str, tuple[Node, bool]]  # by tensor name; whether it is a weight that the adapter was trained on

    def patches(
        self,
        base_types: Mapping[str, TensorType],
        modules: Mapping[str, Module],
        architecture: Architecture,
        config: Mapping[str, object] | None = None,
        *,
        tied: Tied = "refuse",
    ) -> dict[str, Patch]:
        """What the adapter does to each tensor of the base, by name, in the base's order.

        `base_types` are the tensors as floats: quantized weights as what they dequantize to. `config` is the base's
        config.json. With `tied: untie` the head's tensor may be among the names though the base has none; its
        `origin` is the tensor it starts from. Raises OpError with every part that finds no place in the base.
        """
        base = Base(base_types, modules, architecture, config or {})
        collected = _Changes()
        for path, parts in self.parts.items():
            self._collect(path, parts, base, collected)
        for name, (node, restores) in self.whole.items():
            self._collect_whole(name, Replacement(node, restores), base, collected)
        problems = [*_unplaced(self.name, collected.lost, base), *_misfits(self.name, collected.misfits)]
        if problems:
            raise OpError(*problems)
        same = self.settings.flag("ensure_weight_tying")
        patches = tied_patches(collected.changes, collected.head_changes, base, tied, same=same)
        return self._checked(patches, base)

    def _collect(self, path: str, parts: tuple[Part, ...], base: Base, into: _Changes) -> None:
        try:
            gathered = self.method.gathered(path, parts, base, self.settings)
            if gathered is not None:
                into.changes += gathered
                return
            target, is_head = base.placed(path)
            if not self._is_targeted(path, parts):
                raise Inconsistent(
                    "is not among the `target_modules` of the adapter's config, so that PEFT would ignore it"
                )
            part, *others = parts
            if target is None or others:
                into.lost.append(path)
                return
            changes = into.head_changes if is_head else into.changes
            changes += self._changes(part, target)
        except Misfit as misfit:
            into.misfits.append((path, misfit))

    def _is_targeted(self, path: str, parts: tuple[Part, ...]) -> bool:
        only_tokens = all(set(part.nodes) == {TOKENS} for part in parts)
        return only_tokens or self.settings.flag("ensure_weight_tying") or self.settings.targets(path)

    def _changes(self, part: Part, target: Target) -> Iterator[Change]:
        if set(part.nodes) - {TOKENS}:
            yield from self.method.changes(part, target, self.settings, self.shared)
        if TOKENS in part.nodes:
            yield token_change(part, target, self.settings)

    def _collect_whole(self, name: str, replacement: Replacement, base: Base, into: _Changes) -> None:
        path, _, parameter = name.rpartition(".")
        target, is_head = base.placed(path)
        if target is None or f"{target.path}.{parameter}" not in base.types:
            into.lost.append(name)
            return
        change = Change(f"{target.path}.{parameter}", replacement)
        (into.head_changes if is_head else into.changes).append(change)

    def _checked(self, patches: Mapping[str, Patch], base: Base) -> dict[str, Patch]:
        """`patches` in the base's order, each held against the type it is for."""
        misfits: list[tuple[str, Misfit]] = []
        for name, patch in patches.items():
            try:
                patch.type(base.types[patch.origin or name])
            except ValueError as error:
                misfits.append((name, Misfit(f"does not fit: {error}")))
        if misfits:
            raise OpError(*_misfits(self.name, misfits))
        order = {name: place for place, name in enumerate(base.types)}
        return dict(sorted(patches.items(), key=lambda item: order.get(item[0], len(order))))


@dataclass(slots=True)
class _Changes:
    """What is gathered from all parts of an adapter."""

    changes: list[Change] = field(default_factory=list[Change])
    head_changes: list[Change] = field(default_factory=list[Change])  # of a head that shares the embedding's tensor
    lost: list[str] = field(default_factory=list[str])  # modules and tensors that the base lacks
    misfits: list[tuple[str, Misfit]] = field(default_factory=list[tuple[str, Misfit]])


def read_adapter(model: Model) -> Adapter:
    """The adapter `model`. Raises OpError for one that cannot be folded, or with every key that is none of PEFT's."""
    at = str(model.checkpoint.home)
    settings = Settings(model.config)
    method = _method(model.name, settings, at)
    parts: dict[str, dict[int, dict[str, Node]]] = {}
    shared: dict[str, Node] = {}
    whole: dict[str, tuple[Node, bool]] = {}
    strange: list[str] = []
    for key, node in model.nodes.items():
        name = key.removeprefix(INNER_PREFIX).removeprefix(PREFIX)
        place = _place(name, method)
        if not key.startswith(PREFIX):
            strange.append(key)
        elif name in method.shared:
            shared[name] = node
        elif place is None:
            bare, restores = _unwrapped(name)
            if bare not in whole or whole[bare][1]:  # before training if nothing else; trained twice is the same
                whole[bare] = (node, restores)
        else:
            path, depth, slot = place
            parts.setdefault(path, {}).setdefault(depth, {})[slot] = node
    if strange or not (parts or whole):
        raise OpError(_strange(model.name, strange, at))
    try:
        method.check(settings, shared)
    except Misfit as misfit:
        raise OpError(Problem(f"adapter `{model.name}` {misfit}", at)) from None
    grouped = {
        path: tuple(Part(path, nodes, depth) for depth, nodes in by_depth.items()) for path, by_depth in parts.items()
    }
    return Adapter(model.name, settings, method, grouped, shared, whole)


def _place(name: str, method: Method) -> tuple[str, int, str] | None:
    """The module's path, how many wrappers deep, and the slot; None for a tensor that no method names."""
    suffixes = {**TOKEN_SUFFIXES, **method.suffixes}
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.endswith(f".{suffix}"):
            path = name.removesuffix(f".{suffix}")
            bare = path.replace(WRAPPED, "")
            return bare, (len(path) - len(bare)) // len(WRAPPED), suffixes[suffix]
    return None


def _unwrapped(name: str) -> tuple[str, bool]:
    """The tensor's name in the base; and whether it is what the adapter was trained on, not what it trained."""
    match = WRAPPER.search(name)
    return (name[: match.start()] + name[match.end() :], match["before"] is not None) if match else (name, False)


def _method(name: str, settings: Settings, at: str) -> Method:
    kind = settings.peft_type
    if not kind:
        what = f"adapter `{name}` is no PEFT adapter: its adapter_config.json does not say what `peft_type` it is of"
        raise OpError(Problem(what, at, "give a directory that PEFT's `save_pretrained` wrote"))
    if kind in PROMPT_METHODS:
        what = f"adapter `{name}` is of the type {kind}: it adds to the input, which no weight of the base stands for"
        raise OpError(Problem(what, at, "use it with PEFT beside the base; it cannot be folded"))
    if kind not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise OpError(Problem(f"adapter `{name}` is of the type {kind}, which is not folded here", at, f"{known} are"))
    return METHODS[kind]


def _strange(name: str, keys: list[str], at: str) -> Problem:
    if not keys:
        return Problem(f"adapter `{name}` holds no tensors", at, "save it again with PEFT's `save_pretrained`")
    what = f"{_some(keys, 'tensor')} of adapter `{name}` do not begin with `{PREFIX}`, so that PEFT would ignore them"
    return Problem(what, at, "save it again with PEFT's `save_pretrained`")


def _unplaced(name: str, lost: list[str], base: Base) -> Iterator[Problem]:
    if lost:
        known = [*base.modules, *base.types]
        near = difflib.get_close_matches(lost[0], known, 1, 0.5)
        hint = f"the nearest to `{lost[0]}` is `{near[0]}`; " if near else ""
        yield Problem(f"adapter `{name}` changes {_some(lost, 'module')} that the base lacks", fix=hint + Misfit.fix)


def _misfits(name: str, misfits: Iterable[tuple[str, Misfit]]) -> Iterator[Problem]:
    """One problem for all modules with the same reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for path, misfit in misfits:
        reasons.setdefault((str(misfit), misfit.fix), []).append(path)
    for (reason, fix), paths in reasons.items():
        more = f" (and {len(paths) - 1} more modules like it)" if len(paths) > 1 else ""
        yield Problem(f"adapter `{name}` cannot be folded into the base: its `{paths[0]}`{more} {reason}", fix=fix)


def _some(names: list[str], noun: str) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({shown}{more})"


def refuse_other_base(model: Model, source: Model) -> None:
    """Raises OpError if the manifest beside the adapter `model` says that it was made for another checkpoint."""
    home = model.checkpoint.home
    if not home.has(MANIFEST):
        return
    base = read_json(home, MANIFEST).get("base")
    stated = cast("Mapping[str, object]", base).get("identity") if isinstance(base, Mapping) else None
    if isinstance(stated, str) and stated != source.checkpoint.identity:
        what = f"adapter `{model.name}` was made for the base {stated}; the source is {source.checkpoint.identity}"
        raise OpError(Problem(what, home.at(MANIFEST), "give that base as the source, or set `any_base: true`"))
