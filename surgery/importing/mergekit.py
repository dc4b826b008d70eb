"""A mergekit config as a spec: the same models, numbers and order, by our ops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath

from surgery.errors import SpecError
from surgery.importing.config import Config, Input, Piece, Reference, read_config
from surgery.importing.methods import Parameter
from surgery.importing.settings import rules_of, value_of
from surgery.importing.slices import Part, check_aligned, outer_factors, scale_of, value_by_layer
from surgery.importing.text import spec_text
from surgery.op import SOURCE
from surgery.spec.document import Document

__all__ = ["from_mergekit"]

Fields = dict[str, object]


def from_mergekit(document: Document) -> str:
    """The spec that does what the mergekit config in `document` means, as YAML.

    What surgery does otherwise stands at its top, as notes. Raises SpecError with every key that means nothing
    and every wish that no op fulfils.
    """
    config = read_config(document)
    spec = _Translation(config).spec()
    if config.problems:
        raise SpecError(*config.problems)
    name = PurePath(document.file).name
    return spec_text(spec, [f"From {name}, a config of mergekit.", *(f"note: {note}" for note in config.notes)])


class _Translation:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.method = config.method
        self.names: dict[str, str] = {}
        self.source = self._source()

    def spec(self) -> Fields:
        """The whole spec, as plain data."""
        if self.config.name != "passthrough":
            edits = self._with_dtypes(self._merge())
        elif self.config.sliced:
            edits = self._with_dtypes(self._layers(), merges=False)
        else:
            edits = self._with_dtypes(self._single())
        models: Fields = {"models": {name: path for path, name in self.names.items()}} if self.names else {}
        return {"version": 1, "source": self.source, **models, "edits": edits}

    def _source(self) -> str:
        """The base, or the first model; the model below the LoRAs where there is nothing else."""
        inputs = [item.model for piece in self.config.pieces for item in piece.inputs]
        base = self.config.base
        if self.config.name == "passthrough" and self.config.sliced:
            if base and base != inputs[0]:
                self.config.note(f"config and tokenizer are those of the first slice's model, not of `{base}`")
            return inputs[0].model
        if base:
            if base.lora and inputs != [base]:
                fix = "merge that LoRA into its base first: a config with `merge_method: passthrough`"
                self.config.report("a LoRA in `base_model` is not translated", ("base_model",), fix)
            return base.model
        if not inputs:
            self.config.report("the config names no model", (), "list one under `models`")
            raise SpecError(*self.config.problems)
        return next((item.model for item in inputs if not item.lora), inputs[0].model)

    def _name(self, item: Input) -> str:
        """What the spec calls a model. Reports a LoRA over another base than the source."""
        reference = item.model
        if reference.lora and reference.model != self.source:
            fix = f"merge `{reference.lora}` into `{reference.model}` first, and name the result"
            self.config.report(f"`{reference}` is a LoRA over another model than the source", item.keys, fix)
        if reference == Reference(self.source):
            return SOURCE
        path = reference.lora or reference.model
        if path not in self.names:
            self.names[path] = _unique(path, {SOURCE, *self.names.values()})
        return self.names[path]

    # Merges

    def _inputs(self) -> list[Input]:
        """The models in order; mergekit adds a base that is not among `models` behind them."""
        first = self.config.pieces[0]
        inputs, base = list(first.inputs), self.config.base
        if base and base not in [item.model for item in inputs]:
            if not self.config.sliced:
                inputs.append(Input(base, first.own, ("base_model",)))
            elif self.method.base != "counted":
                self.config.report(f"the base `{base}` is not among the sources of the slice", first.keys, "add it")
        return inputs

    def _merge(self) -> list[Fields]:
        if self.config.sliced:
            check_aligned(self.config)
        if self.config.problems:
            return []
        inputs, base = self._inputs(), self.config.base
        if self.method.base == "required" and not base:
            self.config.report(f"`{self.config.name}` needs a `base_model`", ("merge_method",), "name it")
        apart = base if self.method.base != "counted" else None
        others = [item for item in inputs if item.model != apart]
        self._check_count(len(others))
        for item in inputs:
            if item.model == apart and item.own.settings:
                self.config.note(f"parameters of the base `{apart}` have no effect, in mergekit neither")
        models = {self._name(item): self._values(item) for item in others}
        return [{"op": self.method.op, "models": models, **self._values(None)}]

    def _check_count(self, count: int) -> None:
        least, most = max(1, self.method.least), self.method.most
        if count < least or (most and count > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            beside = "" if self.method.base == "counted" else " beside the base"
            self.config.report(f"`{self.config.name}` merges {wanted} models{beside}; {count} are given", ("models",))

    def _values(self, item: Input | None) -> Fields:
        """The parameters of one model, or those of the whole edit."""
        parameters = [each for each in self.method.parameters if each.per_model == (item is not None)]
        found = {each.ours: self._value(each, item) for each in parameters if not each.without_effect}
        return {key: value for key, value in found.items() if value is not None}

    def _value(self, parameter: Parameter, item: Input | None) -> object:
        parts = [self._part(piece, item) for piece in self.config.pieces]
        if len(parts) == 1:
            return value_of(self.config, parameter, parts[0].levels)
        return value_by_layer(self.config, parameter, parts)

    def _part(self, piece: Piece, item: Input | None) -> Part:
        """Where `piece` speaks of the model of `item`, the innermost level first."""
        own = [each for each in piece.inputs if item and each.model == item.model]
        layers = piece.inputs[0].layers or (0, 0)
        levels = (*(each.own for each in own), piece.own, *self.config.outer)
        return Part(levels, range(*layers))

    # Passthrough

    def _layers(self) -> list[Fields]:
        slices: list[Fields] = []
        (scale,) = self.method.parameters
        pieces = self.config.pieces
        for piece in pieces:
            if len(piece.inputs) != 1:
                self.config.report("a slice of `passthrough` has one source", piece.keys, "merge with another method")
                continue
            (item,) = piece.inputs
            if item.model.lora:
                fix = "merge the LoRA into its base first: a config with `merge_method: passthrough`"
                self.config.report("layers of a model with a LoRA are not translated", item.keys, fix)
                continue
            name = self._name(item)
            factors = scale_of(self.config, scale, piece, item)
            for last in [False] * (piece is pieces[0]) + [True] * (piece is pieces[-1]):
                outer_factors(self.config, scale, piece, item, last=last)
            model: Fields = {"model": name} if name != SOURCE else {}
            if factors and (self.config.dtype or self.config.out_dtype):
                self.config.note("layers are scaled in the models' own dtype, and cast at the end")
            slices.append({**model, "layers": list(item.layers or ()), **({"scale": factors} if factors else {})})
        head = str(slices[-1].get("model", SOURCE)) if slices else SOURCE
        return [{"op": self.method.op, "slices": slices, **({"head": head} if head != SOURCE else {})}]

    def _single(self) -> list[Fields]:
        """One model as it is, with its LoRA, or times a factor."""
        inputs = self._inputs()
        if len(inputs) != 1:
            fix = "merge with another method, or choose layers with `slices`"
            what = f"`passthrough` passes one model through; {len(inputs)} are given, a `base_model` among them"
            self.config.report(what if self.config.base else what.partition(",")[0], ("models",), fix)
            return []
        (scale,) = self.method.parameters
        (item,) = inputs
        given = rules_of(self.config, scale, (item.own, *self.config.outer), default=False)
        factor = value_of(self.config, scale, (item.own, *self.config.outer)) if given else 1
        if item.model.lora or factor != 1:
            return [{"op": "merge.linear", "models": {self._name(item): {"weight": factor}}, "normalize": False}]
        return []

    # Dtypes

    def _with_dtypes(self, edits: list[Fields], *, merges: bool = True) -> list[Fields]:
        dtype, out = self.config.dtype, self.config.out_dtype
        if dtype == "float64":
            self.config.report("no op computes in float64", ("dtype",), "write float32: it is rounded once, at the end")
        if not merges or not edits:
            return [*edits, *_cast(out or dtype)]
        if dtype == "float32" and out in ("", "float32"):
            merged = [{**edit, "compute_dtype": "float32", "mixed_dtypes": True} for edit in edits]
            return [*_cast("float32"), *merged]
        if dtype in ("bfloat16", "float16"):
            self.config.note(f"models of another dtype than {dtype} are merged in their own, and cast at the end")
        compute = "float32" if dtype == "float32" else SOURCE
        return [*({**edit, "compute_dtype": compute} for edit in edits), *_cast(out or dtype)]


def _cast(dtype: str) -> list[Fields]:
    return [{"op": "tensor.cast", "tensors": ".*", "dtype": dtype}] if dtype else []


def _unique(path: str, taken: Iterable[str]) -> str:
    """A name for the model at `path`: its last part, in the letters that names have."""
    last = PurePath(path.partition("@")[0]).name.lower()
    name = re.sub(r"[^a-z0-9_]+", "-", last).strip("-") or "model"
    numbered = (f"{name}-{number}" if number > 1 else name for number in range(1, 1 << 16))
    return next(each for each in numbered if each not in set(taken))
