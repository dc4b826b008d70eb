"""YAML with the line of every value, read safely: no tags, no duplicate keys, bounded aliases."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from surgery.errors import Problem, SpecError

__all__ = ["Document", "Keys", "parse_scalar", "read_document"]

Keys = tuple[str | int, ...]

MAX_NODES = 100_000  # an alias stands for all it names: a few lines can expand to billions
MAX_DEPTH = 64
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
MAX_BYTES = 2 * 1024 * 1024
MAX_NUMBER = 400  # characters; reading a number of n digits takes n² steps
PLAIN_SCALARS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "bool", "int", "float"))
STREAMS = ("/dev/", "/proc/self/fd/")  # what the shell calls a pipe that it made
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with 1e-3 a number as in YAML 1.2 and JSON, and no dates."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One more node, as long as there are not too many."""
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"it has more than {MAX_NODES} values")
        return super().compose_node(parent, index)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data, and the line on which each value starts, by its keys from the root."""

    data: object
    lines: dict[Keys, int]
    file: str

    def place(self, keys: Keys) -> str:
        """`qlora.yaml:7, edits[1].modules`; the line of the nearest value that has one."""
        known = keys
        while known and known not in self.lines:
            known = known[:-1]
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        line = self.lines.get(known)
        where = f"{self.file}:{line}" if line else self.file
        return f"{where}, {path}" if path else where


def read_document(path: Path) -> Document:
    """Parse a YAML file. Raises SpecError for what is no YAML, or YAML that hides something."""
    file = str(path)
    try:
        if stat.S_ISFIFO(path.stat().st_mode) and not file.startswith(STREAMS):
            raise SpecError(Problem("is a pipe, no file", file))
        with path.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise SpecError(Problem(f"has more than {MAX_BYTES} bytes: that is no spec", file))
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(Problem(f"cannot be read: {error}", file)) from None
    return _Builder(file).build(text)


def parse_scalar(text: str) -> object:
    """The value of a YAML scalar: `16` is an int, `bf16` a string. Anything else stays text."""
    if len(text) > MAX_NUMBER:
        return text
    try:
        value = cast(object, yaml.load(text, _Loader))  # a SafeLoader
    except (yaml.YAMLError, LookupError, ValueError, OverflowError, RecursionError):
        return text
    return value if isinstance(value, str | int | float | bool) else text


def _constructed(loader: _Loader, node: yaml.Node) -> object:
    """The value of a scalar. Raises MarkedYAMLError where it is not what its tag says."""
    try:
        return cast(object, loader.construct_object(node))  # pyright: ignore[reportUnknownMemberType]
    except (LookupError, ValueError, OverflowError):
        what = f"{cast(str, node.value)[:MAX_NUMBER]!r} is no {node.tag.rpartition(':')[2]}"
        raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[Keys, int] = {}
        self.problems: list[Problem] = []
        self.num_nodes = 0

    def build(self, text: str) -> Document:
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                data = self._value(loader, root, ()) if root else None
            finally:
                loader.dispose()  # pyright: ignore[reportUnknownMemberType]
        except yaml.YAMLError as error:
            raise SpecError(self._syntax_problem(error)) from None
        except SpecError:
            raise
        except (RecursionError, ValueError, OverflowError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise SpecError(Problem(f"is no valid YAML: {reason}", self.file)) from None
        if self.problems:
            raise SpecError(*self.problems)
        return Document(data, self.lines, self.file)

    def _syntax_problem(self, error: yaml.YAMLError) -> Problem:
        mark = cast("yaml.Mark | None", getattr(error, "problem_mark", None))
        what = cast("str | None", getattr(error, "problem", None)) or str(error).splitlines()[0]
        at = f"{self.file}:{mark.line + 1}" if mark else self.file
        fix = "check indentation and quotes; a regex goes in single quotes"
        return Problem(f"is no valid YAML: {what}", at, fix)

    def _value(self, loader: _Loader, node: yaml.Node, keys: Keys) -> object:
        self.num_nodes += 1
        line = node.start_mark.line + 1
        if self.num_nodes > MAX_NODES or len(keys) > MAX_DEPTH:
            what = f"expands to more than {MAX_NODES} values or {MAX_DEPTH} levels"
            raise SpecError(Problem(what, f"{self.file}:{line}", "write it without anchors and aliases"))
        self.lines.setdefault(keys, line)
        if isinstance(node, yaml.CollectionNode) and node.tag not in PLAIN_TAGS:
            what = f"could not determine a constructor for the tag {node.tag!r}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, keys)
        if isinstance(node, yaml.SequenceNode):
            children = cast("list[yaml.Node]", node.value)
            return [self._value(loader, child, (*keys, index)) for index, child in enumerate(children)]
        return self._scalar(loader, node)

    def _scalar(self, loader: _Loader, node: yaml.Node) -> object:
        tag, text = node.tag, cast(str, node.value)
        if tag not in PLAIN_SCALARS:
            what = f"could not determine a constructor for the tag {tag!r}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        if tag != PLAIN_SCALARS[0] and len(text) > MAX_NUMBER:
            raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} characters", problem_mark=node.start_mark)
        return _constructed(loader, node)

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, keys: Keys) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            line = key_node.start_mark.line + 1
            is_scalar = isinstance(key_node, yaml.ScalarNode)
            key = _constructed(loader, key_node) if is_scalar else None
            if not isinstance(key, str):
                self.problems.append(Problem("a key must be a plain string", f"{self.file}:{line}", "quote it"))
                continue
            if key in result:
                first = self.lines[(*keys, key)]
                what = f"key `{key}` stands twice, on lines {first} and {line}"
                self.problems.append(Problem(what, f"{self.file}:{line}", "keep one of them"))
                continue
            result[key] = self._value(loader, value_node, (*keys, key))
            self.lines[(*keys, key)] = line
        return result
