"""A mergekit config as it is meant: read strictly, each part with its place in the file.

Why strictly: mergekit ignores keys that it does not know, at every level, so that `densty: 0.1` merges everything.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from surgery.errors import Problem, SpecError
from surgery.importing.methods import METHODS, Method, known_parameters
from surgery.spec.document import Document, Keys

__all__ = ["Config", "Input", "Level", "Piece", "Reference", "read_config"]

TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip
MISPLACED = {
    "random_seed": "take it out; `--random-seed` of mergekit is `seed:` of a spec",
    "name": "take it out: one spec makes one checkpoint",
}
UNDER_PARAMETERS = "put it under `parameters`, where it counts, or take it out"
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model, or a LoRA over it: each a path or Hub id, `@revision` with it."""

    model: str
    lora: str = ""

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else self.model


@dataclass(frozen=True, slots=True)
class Level:
    """The `parameters` of one place, and that place."""

    settings: Mapping[str, object]
    keys: Keys


@dataclass(frozen=True, slots=True)
class Input:
    """One model, with its own parameters and, in a slice, its layers."""

    model: Reference
    own: Level
    keys: Keys
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice; `models:` are one slice without layer ranges."""

    inputs: tuple[Input, ...]
    own: Level
    keys: Keys


@dataclass(slots=True)
class Config:
    """The whole config. `problems` and `notes` grow while it is translated."""

    document: Document
    name: str
    method: Method
    base: Reference | None
    pieces: tuple[Piece, ...]
    sliced: bool
    outer: tuple[Level, ...]  # of a module, of the whole, in this order
    dtype: str
    out_dtype: str
    problems: list[Problem] = field(default_factory=list[Problem])
    notes: list[str] = field(default_factory=list[str])

    def report(self, what: str, keys: Keys, fix: str = "") -> None:
        """Add a problem."""
        self.problems.append(Problem(what, self.document.place(keys), fix))

    def note(self, text: str) -> None:
        """Add a line to the header of the spec, once."""
        if text not in self.notes:
            self.notes.append(text)


def read_config(document: Document) -> Config:
    """The config in `document`. Raises SpecError with every problem that is plain from its form."""
    return _Reader(document).read()


class _Reader:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def read(self) -> Config:
        data = self.document.data
        if not isinstance(data, Mapping):
            what = "is no mergekit config: it holds no keys"
            raise SpecError(Problem(what, self.document.file, "give a config as `mergekit-yaml` takes it"))
        fields = self._map(self.document.data, (), TOP)
        name = str(fields.get("merge_method", ""))
        self._check_method(name, fields)
        base = self._reference(fields["base_model"], ("base_model",)) if fields.get("base_model") else None
        outer = (self._level(fields, ()),)
        body, keys = fields, cast(Keys, ())
        if fields.get("modules"):
            body, keys = self._module(fields)
            outer = (self._level(body, keys), *outer)
        base, pieces = self._pieces(body, keys, base)
        self._check_tokenizer(fields, base, pieces)
        config = Config(
            self.document, name, METHODS.get(name, METHODS["linear"]), base, pieces, bool(body.get("slices")), outer,
            self._dtype(fields, "dtype"), self._dtype(fields, "out_dtype"), notes=self.notes,
        )  # fmt: skip
        if name in METHODS:
            self._check_parameters(config)
        if self.problems:
            raise SpecError(*self.problems)
        return config

    def _report(self, what: str, keys: Keys, fix: str = "") -> None:
        self.problems.append(Problem(what, self.document.place(keys), fix))

    def _map(self, value: object, keys: Keys, known: Iterable[str]) -> Mapping[str, object]:
        """`value`, which should be a map with no keys but these."""
        if not isinstance(value, Mapping):
            self._report(f"{value!r} is no map", keys)
            return {}
        fields = cast("Mapping[str, object]", value)
        for key in fields:
            if key not in known:
                fix = MISPLACED.get(key) or (UNDER_PARAMETERS if key in known_parameters() else _nearest(key, known))
                self._report(f"unknown key `{key}`, which mergekit ignores", (*keys, key), fix)
        return fields

    def _list(self, value: object, keys: Keys) -> list[object]:
        if isinstance(value, list) and value:
            return cast("list[object]", value)
        self._report("must be a list that is not empty", keys)
        return []

    def _check_method(self, name: str, fields: Mapping[str, object]) -> None:
        if name not in METHODS:
            what = f"there is no merge_method `{name}`" if name else "`merge_method` is missing"
            self._report(what, ("merge_method",), _nearest(name, METHODS))
        given = [key for key in ("models", "slices", "modules") if fields.get(key)]
        if len(given) != 1:
            what = f"{' and '.join(f'`{key}`' for key in given)} exclude each other" if given else "no models are named"
            self._report(what, (given[-1],) if given else (), "give one of `models`, `slices` and `modules`")

    def _module(self, fields: Mapping[str, object]) -> tuple[Mapping[str, object], Keys]:
        """The only module; its `models` or `slices` are those of the whole."""
        modules = fields["modules"]
        if not isinstance(modules, Mapping) or len(cast("Mapping[str, object]", modules)) != 1:
            fix = "write a spec by hand: an edit for each, with `tensors`, or `layers.select` with `stack`"
            self._report("`modules` of more than one part are not translated", ("modules",), fix)
            return {}, ("modules",)
        ((name, body),) = cast("Mapping[str, object]", modules).items()
        return self._map(body, ("modules", name), ("models", "slices", "parameters")), ("modules", name)

    def _level(self, fields: Mapping[str, object], keys: Keys) -> Level:
        """The parameters that stand in `fields`."""
        settings = fields.get("parameters")
        place = (*keys, "parameters")
        if settings is not None and not isinstance(settings, Mapping):
            self._report(f"{settings!r} is no map", place)
            settings = None
        return Level(cast("Mapping[str, object]", settings or {}), place)

    def _pieces(
        self, fields: Mapping[str, object], keys: Keys, base: Reference | None
    ) -> tuple[Reference | None, tuple[Piece, ...]]:
        if fields.get("models"):
            return base, (Piece(self._inputs(fields["models"], (*keys, "models"), ("model", "parameters")),
                                Level({}, keys), keys),)  # fmt: skip
        pieces: list[Piece] = []
        bases = {base}
        for index, entry in enumerate(self._list(fields["slices"], (*keys, "slices")) if fields.get("slices") else []):
            place = (*keys, "slices", index)
            piece = self._map(entry, place, ("sources", "base_model", "residual_weight", "parameters"))
            if piece.get("residual_weight") is not None:
                self._report("`residual_weight` does nothing in mergekit", (*place, "residual_weight"), "remove it")
            own = piece.get("base_model")
            bases.add(self._reference(own, (*place, "base_model")) if own else base)
            inputs = self._inputs(piece.get("sources"), (*place, "sources"), ("model", "layer_range", "parameters"))
            pieces.append(Piece(inputs, self._level(piece, place), place))
        bases = bases if len(bases) == 1 else bases - {None}
        if len(bases) > 1:
            self._report("slices with unlike `base_model` are not translated", keys, "name one base for all")
        return next(iter(bases)), tuple(pieces)

    def _inputs(self, value: object, keys: Keys, known: tuple[str, ...]) -> tuple[Input, ...]:
        inputs: list[Input] = []
        for index, entry in enumerate(self._list(value, keys)):
            place = (*keys, index)
            fields = self._map(entry, place, known)
            model = self._reference(fields.get("model"), (*place, "model"))
            if model in [item.model for item in inputs]:
                self._report(f"`{model}` stands twice among the models", place, "keep one of them")
            layers = self._range(fields, place) if "layer_range" in known else None
            inputs.append(Input(model, self._level(fields, place), place, layers))
        return tuple(inputs)

    def _range(self, fields: Mapping[str, object], keys: Keys) -> tuple[int, int]:
        value = fields.get("layer_range")
        items = cast("list[object]", value) if isinstance(value, list) else []
        match items:
            case [int(first), int(stop)] if 0 <= first < stop:
                return first, stop
            case _:
                self._report(f"`layer_range: {value}` is no range", (*keys, "layer_range"), "write [first, one past]")
                return 0, 1

    def _reference(self, value: object, keys: Keys) -> Reference:
        """`path@revision+lora@revision`, or the same as a map."""
        if isinstance(value, Mapping):
            fields = self._map(cast("object", value), keys, ("model", "lora", "override_architecture"))
            lora = fields.get("lora")
            return Reference(self._path(fields.get("model"), keys), self._path(lora, keys) if lora else "")
        parts = str(value or "").split("+")
        if not isinstance(value, str) or not all(parts) or len(parts) > 2:
            self._report(f"{value!r} names no model", keys, "write a path or a Hub id, with `+LORA` if there is one")
            return Reference("")
        return Reference(*parts)

    def _path(self, value: object, keys: Keys) -> str:
        if isinstance(value, Mapping):
            fields = self._map(cast("object", value), keys, ("path", "revision"))
            revision = f"@{fields['revision']}" if fields.get("revision") else ""
            return f"{fields.get('path', '')}{revision}"
        return str(value or "")

    def _dtype(self, fields: Mapping[str, object], key: str) -> str:
        name = str(fields.get(key) or "").removeprefix("torch.")
        if name and name not in DTYPES:
            self._report(f"there is no float dtype `{name}`", (key,), _nearest(name, DTYPES))
        return name

    def _check_tokenizer(self, fields: Mapping[str, object], base: Reference | None, pieces: tuple[Piece, ...]) -> None:
        """Only the source's own tokenizer can be the result's."""
        source, keys = fields.get("tokenizer_source"), cast(Keys, ("tokenizer_source",))
        if fields.get("tokenizer") is not None:
            known = ("source", "tokens", "pad_to_multiple_of")
            tokenizer = self._map(fields["tokenizer"], ("tokenizer",), known)
            source, keys = tokenizer.get("source", "union"), ("tokenizer", "source")
            for key in known[1:]:
                if tokenizer.get(key):
                    fix = "edit the tokenizer and the embeddings of the models first"
                    self._report(f"`{key}` is not translated: no op adds tokens", ("tokenizer", key), fix)
        first = base or next((item.model for piece in pieces for item in piece.inputs), None)
        if source == "union":
            self.notes.append("`union` of tokenizers: models whose tokenizers differ are an error here; with one "
                              "tokenizer, union is that one")  # fmt: skip
        elif source not in (None, "base") and str(source) != str(first):
            fix = "name that model first (or as base_model): the result has the source's tokenizer"
            self._report(f"the tokenizer of `{source}` is not the source's (`{first}`)", keys, fix)
        if fields.get("chat_template"):
            self.notes.append("`chat_template` is not set: the result has the source's tokenizer files as they are")

    def _check_parameters(self, config: Config) -> None:
        levels = [*config.outer, *(level for piece in config.pieces for level in (piece.own, *_levels(piece)))]
        for level in levels:
            for name in level.settings:
                parameter = config.method.find(name)
                if parameter is None and name not in known_parameters():
                    known = [item.name for item in config.method.parameters]
                    fix = _nearest(name, known or known_parameters())
                    self._report(f"unknown parameter `{name}`, which mergekit ignores", (*level.keys, name), fix)
                elif parameter is None or parameter.without_effect:
                    config.note(f"`{name}` has no effect on `{config.name}`, in mergekit neither: it is left out")


def _levels(piece: Piece) -> tuple[Level, ...]:
    return tuple(item.own for item in piece.inputs)


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), 1)
    return f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known) or 'none'}"
