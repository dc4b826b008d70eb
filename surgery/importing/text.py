"""A spec as YAML text, as a person would write it: regexes in single quotes, small maps on one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import yaml

from surgery.escapes import escaped

__all__ = ["spec_text"]


class _Quoted(str):
    """A text that stands in single quotes."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    """Without aliases: what stands twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Always."""
        del data
        return True


def _quoted(dumper: yaml.SafeDumper, text: _Quoted) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="'")  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(_Quoted, _quoted)  # pyright: ignore[reportUnknownMemberType]


def spec_text(spec: Mapping[str, object], comments: Iterable[str]) -> str:
    """`spec` as YAML, with `comments` above it."""
    lines = [f"# {escaped(comment)}\n" for comment in comments]
    for key, value in spec.items():
        flow = None if key == "edits" else False  # None: what holds no lists or maps goes on one line
        fields = {key: _with_quotes(value)}
        lines.append(yaml.dump(fields, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=110))
    return "".join(lines)


def _with_quotes(value: object) -> object:
    """`value` with every text that looks like a regex quoted."""
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, object]", value)
        return {cast(str, _with_quotes(key)): _with_quotes(item) for key, item in fields.items()}
    if isinstance(value, list):
        return [_with_quotes(item) for item in cast("list[object]", value)]
    return _Quoted(value) if isinstance(value, str) and any(letter in value for letter in "*\\(") else value
