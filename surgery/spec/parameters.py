"""`params` and `${NAME}`: what makes one spec serve many models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import cast

from surgery.errors import Problem, SpecError
from surgery.spec.document import Document, Keys, parse_scalar

__all__ = ["Parameters", "substitute"]

MAX_LENGTH = 1 << 20
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


class Parameters:
    """The values of a spec's parameters: its defaults, overridden by `settings`."""

    def __init__(self, document: Document, settings: Mapping[str, object]) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.unresolved: set[Keys] = set()
        self.length = 0  # of what has been filled in
        self.values: dict[str, object] = dict(self._defaults())
        for name, value in settings.items():
            self._set(name, value)

    def _defaults(self) -> Mapping[str, object]:
        data = self.document.data
        params = cast(Mapping[str, object], data).get("params") if isinstance(data, Mapping) else None
        return cast(Mapping[str, object], params) if isinstance(params, Mapping) else {}

    def _set(self, name: str, value: object) -> None:
        if name not in self.values:
            known = ", ".join(self.values) or "none"
            what = f"parameter `{name}` is set, but the spec has no such parameter (it has: {known})"
            self.problems.append(Problem(what, self.document.place(("params",)), _did_you_mean(name, self.values)))
        elif isinstance(value, str) and not isinstance(self.values[name], str):
            self.values[name] = parse_scalar(value)
        else:
            self.values[name] = value

    def resolve(self, text: str, keys: Keys) -> object:
        """`text` with references replaced; a text that is one reference takes the value's own type."""
        whole = _REFERENCE.fullmatch(text)
        if whole:
            return self._value(whole[1], keys)
        return self._filled(text, keys)

    def _filled(self, text: str, keys: Keys) -> str:
        """`text` with values in it, each named once if it has none; all texts together of bounded length."""
        names = dict.fromkeys(match[1] for match in _REFERENCE.finditer(text))
        values = {name: str(self._value(name, keys)) for name in names}
        self.length += sum(len(values[match[1]]) for match in _REFERENCE.finditer(text))
        if self.length > MAX_LENGTH:
            what = f"the values of parameters make the spec longer than {MAX_LENGTH} characters"
            raise SpecError(Problem(what, self.document.place(keys), "refer to them less often"))
        return _REFERENCE.sub(lambda match: values[match[1]], text)

    def _value(self, name: str, keys: Keys) -> object:
        if self.values.get(name) is None:
            self.unresolved.add(keys)
        if name not in self.values:
            what = f"`${{{name}}}` names no parameter"
            fix = _did_you_mean(name, self.values) or f"add `{name}` to `params`"
            self.problems.append(Problem(what, self.document.place(keys), fix))
        elif self.values[name] is None:
            what = f"parameter `{name}` has no value"
            self.problems.append(Problem(what, self.document.place(keys), f"give it one: --set {name}=..."))
        return self.values.get(name)


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean `{near[0]}`?" if near else ""


def substitute(parameters: Parameters, value: object, keys: Keys = ()) -> object:
    """`value` with every reference in it replaced, `params` itself left as it is."""
    if keys == ("params",):
        return cast(object, parameters.values)
    if isinstance(value, str):
        return parameters.resolve(value, keys)
    if isinstance(value, list):
        items = cast(list[object], value)
        return [substitute(parameters, item, (*keys, index)) for index, item in enumerate(items)]
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        return {key: substitute(parameters, item, (*keys, key)) for key, item in fields.items()}
    return value
