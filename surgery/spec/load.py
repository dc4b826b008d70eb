"""From a file to a `Spec`, with every problem found on the way reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import cast

from surgery.errors import Problem, SpecError, most
from surgery.op import SOURCE, Op, find_op, op_names, options_of
from surgery.regexes import flaw, shared_time
from surgery.sizes import parse_size
from surgery.spec.document import Document, Keys, read_document
from surgery.spec.model import ALL_LINEAR, Edit, Patterns, Spec
from surgery.spec.parameters import Parameters, substitute
from surgery.spec.schema import edit_schema, frame_schema
from surgery.spec.violations import explain

__all__ = ["load_spec"]

DEFAULT_SHARD_SIZE = "5GB"
LARGEST_NUMBER = 1e300
LARGEST_SEED = 2**64 - 1  # as torch has it
MOST_EDITS = 1000


@shared_time()
def load_spec(spec: str | Path | Mapping[str, object], settings: Mapping[str, object]) -> Spec:
    """Read and check a spec: a YAML file, the name of a recipe that comes with surgery, or plain data.

    `settings` override its parameters. Raises SpecError with every problem found.
    """
    document = Document(spec, {}, "spec") if isinstance(spec, Mapping) else read_document(_find(Path(spec)))
    return _Loader(document, settings).load()


def _find(path: Path) -> Path:
    """The file `path`, or the recipe of that name. Raises SpecError if there is neither."""
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise SpecError(Problem(f"cannot be read: {error}", str(path))) from None
    installed = (Path(str(resources.files("surgery"))) / "specs", Path(__file__).parents[2] / "specs")
    recipes = {recipe.stem: recipe for directory in installed for recipe in sorted(directory.glob("*.yaml"))}
    if len(path.parts) == 1 and path.stem in recipes:
        return recipes[path.stem]
    near = difflib.get_close_matches(path.stem, recipes, 1)
    hint = f"did you mean the recipe `{near[0]}`? " if near else ""
    fix = f"{hint}Give a YAML file, or a recipe that comes with surgery: {', '.join(recipes)}"
    raise SpecError(Problem("is no spec: there is no such file", str(path), fix))


class _Loader:
    def __init__(self, document: Document, settings: Mapping[str, object]) -> None:
        self.document = document
        self.parameters = Parameters(document, settings)
        self.problems: list[Problem] = []

    def load(self) -> Spec:
        if "merge_method" in _map(self.document.data):
            fix = f"`surgery import-mergekit {self.document.file}` turns it into one"
            raise SpecError(Problem("is a configuration of mergekit, no spec", self.document.file, fix))
        data = substitute(self.parameters, self.document.data)
        self.problems += self.parameters.problems
        self._check(data, frame_schema(), ())
        fields = _map(data)
        self._check_numbers(fields.get("edits"), ("edits",))
        self._check_seed(fields.get("seed", 0))
        entries = _list(fields.get("edits"))
        if len(entries) > MOST_EDITS:
            self._report(f"has {len(entries)} edits, more than {MOST_EDITS}", ("edits",), "select more with each regex")
        edits = [self._edit(index, entry) for index, entry in enumerate(entries[:MOST_EDITS])]
        self._check_edits(edits)
        shard_bytes = self._shard_bytes(fields)
        models = cast("Mapping[str, str]", _map(fields.get("models")))
        self._check_models(models, edits)
        if self.problems:
            raise SpecError(*most(self.problems, self.document.file))
        return Spec(
            source=cast(str, fields["source"]),
            models=models,
            edits=tuple(edit for edit in edits if edit is not None),
            shard_bytes=shard_bytes,
            copy_base=bool(_map(fields.get("output")).get("copy_base")),
            seed=cast(int, fields.get("seed", 0)),
            resolved=fields,
            document=self.document,
        )

    def _report(self, what: str, keys: Keys, fix: str = "") -> None:
        self.problems.append(Problem(what, self.document.place(keys), fix))

    def _check(self, data: object, schema: Mapping[str, object], keys: Keys) -> bool:
        from jsonschema import Draft202012Validator

        errors = list(Draft202012Validator(schema).iter_errors(data))  # pyright: ignore[reportUnknownMemberType, reportArgumentType]
        for error in errors:
            place = (*keys, *cast("Iterable[str | int]", error.absolute_path))
            if place not in self.parameters.unresolved:
                for violation in explain(error):
                    self._report(violation.what, (*place, *violation.below), violation.fix)
        return not errors

    def _check_numbers(self, value: object, keys: Keys) -> None:
        """YAML knows numbers that nothing can be computed with."""
        if isinstance(value, dict):
            for key, item in cast("dict[str, object]", value).items():
                self._check_numbers(item, (*keys, key))
        elif isinstance(value, list):
            for index, item in enumerate(cast("list[object]", value)):
                self._check_numbers(item, (*keys, index))
        elif isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:  # not so for NaN
            self._report(f"{value!r:.40} is no number to compute with", keys, "give a finite one")

    def _check_seed(self, seed: object) -> None:
        if isinstance(seed, int) and seed > LARGEST_SEED:
            self._report("is too large for a seed", ("seed",), f"give one up to {LARGEST_SEED}")

    def _edit(self, index: int, entry: object) -> Edit | None:
        keys: Keys = ("edits", index)
        if not isinstance(entry, dict):
            return None  # reported by the frame's schema
        fields = _map(cast(object, entry))
        name = fields.get("op")
        if not isinstance(name, str) or name not in op_names():
            self._report_unknown_op(name, keys)
            return None
        if not self._check(fields, edit_schema(name), keys):
            return None
        op_class = find_op(name)
        patterns = self._patterns(fields, op_class, keys)
        if patterns is None:
            return None
        values = {option.field: _typed(fields[option.key]) for option in options_of(op_class) if option.key in fields}
        op = op_class(**values)
        mistake = op.check(patterns.regexes)
        if mistake:
            self._report(mistake, keys)
        place = self.document.place(keys)
        places = (self.document.place((*keys, key)) for key in (op.selects, "except"))
        return Edit(index, op, patterns, place, *places)

    def _report_unknown_op(self, name: object, keys: Keys) -> None:
        if name is None:
            self._report("`op` is missing", keys, "add `op: family.name`; `surgery ops` lists them")
            return
        near = difflib.get_close_matches(str(name), op_names(), 1, 0.5)
        fix = f"did you mean `{near[0]}`?" if near else "`surgery ops` lists them"
        self._report(f"there is no op `{name}`", (*keys, "op"), fix)

    def _patterns(self, fields: Mapping[str, object], op: type[Op], keys: Keys) -> Patterns | None:
        selected = fields.get(op.selects, [])
        all_linear = selected == ALL_LINEAR and op.selects == "modules"
        regexes = [] if all_linear else self._compile(selected, (*keys, op.selects))
        excepts = self._compile(fields.get("except", []), (*keys, "except"))
        if regexes is None or excepts is None:
            return None
        return Patterns(tuple(regexes), all_linear, tuple(excepts), cast("int | None", fields.get("expect")))

    def _compile(self, value: object, keys: Keys) -> list[re.Pattern[str]] | None:
        texts = cast(list[str], value) if isinstance(value, list) else [cast(str, value)]
        compiled: list[re.Pattern[str]] = []
        for index, text in enumerate(texts):
            if reason := flaw(text):
                place = (*keys, index) if isinstance(value, list) else keys
                fix = "escape dots as `\\.`, and put the regex in single quotes"
                self._report(f"`{text}` is no regex: {reason}", place, fix)
            else:
                compiled.append(re.compile(text))
        return compiled if len(compiled) == len(texts) else None

    def _check_edits(self, edits: list[Edit | None]) -> None:
        given = [edit for edit in edits if edit is not None]
        for position, edit in enumerate(given):
            for earlier in given[:position]:
                conflict = edit.op.conflicts(earlier.op)
                if conflict:
                    what = f"{edit} conflicts with {earlier}: {conflict}"
                    self.problems.append(Problem(what, edit.place, "make them agree"))

    def _shard_bytes(self, fields: Mapping[str, object]) -> int:
        size = _map(fields.get("output")).get("shard_size")
        try:
            return parse_size(cast("str | int", size or DEFAULT_SHARD_SIZE))
        except ValueError as error:
            place = self.document.place(("output", "shard_size"))
            if all(problem.at != place for problem in self.problems):
                self._report(str(error), ("output", "shard_size"))
            return 0

    def _check_models(self, models: Mapping[str, str], edits: list[Edit | None]) -> None:
        if SOURCE in models:
            self._report(f"`{SOURCE}` is what edits call the source itself", ("models", SOURCE), "give another name")
        used: set[str] = set()
        for edit in edits:
            for name in dict.fromkeys(edit.op.model_names()) if edit else ():
                used.add(name)
                if name not in models and name != SOURCE and edit:
                    near = difflib.get_close_matches(name, models, 1)
                    fix = f"did you mean `{near[0]}`?" if near else f"add `{name}` to `models` of the spec"
                    self._report(f"there is no model `{name}`", ("edits", edit.index, "models"), fix)
        for name in models if all(edits) else ():
            if name not in used:
                self._report(f"model `{name}` is used by no edit", ("models", name), "use it in an edit, or remove it")


def _map(value: object) -> Mapping[str, object]:
    return cast(Mapping[str, object], value) if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return cast(list[object], value) if isinstance(value, list) else []


def _typed(value: object) -> object:
    """JSON knows one kind of number: 64.0 is 64."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
