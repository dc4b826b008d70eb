"""The language of the inventory's table: which parameters a model has, from the keys of its config.

A template has one line for each module, in the order in which the live model holds them:

    embed_tokens vocab_size hidden_size          a weight [vocab_size, hidden_size]
    layers.* num_hidden_layers                   as often as the config says, 0, 1, ... for `*`; what is
      self_attn.q_proj q hidden_size +           indented is below it. `+`: also a bias [q]
      mlp.down_proj hidden_size ffn +mlp_bias    the bias only if the expression is true
      self_attn.q_norm head_dim ?has_norms       the module only if the expression is true (`?!`: if not)
    @embeddings.cls_token 1 1 hidden_size        the parameter itself, without `.weight`
    model.**                                     here comes the family's base model, below `model`

Dimensions and conditions are expressions over the keys of the config and the names that a family
defines, a small part of Python: arithmetic, comparison, `and`, `or`, `not`, `len`, `x if y else z`.
A key that the config lacks, or sets to null, is None; `a | b` is b where a is None.

Why not Python's own `eval`: an unknown key must be reported by its name, and a table is data.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

__all__ = ["Keys", "Missing", "Parameters", "expand"]

INDENT = "  "
MAX_REPEATS = 1 << 14  # layers or experts; a config that says more would only fill the memory


class Missing(LookupError):
    """A key that the config lacks, or holds something unfit under."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What the names in an expression stand for."""

    config: Mapping[str, object]
    defined: Mapping[str, str]  # by the family: name → expression
    given: Mapping[str, object]  # `layer`: the number of the outermost repetition; what the caller says

    def value(self, name: str) -> object:
        """What `name` stands for; None if nothing says so."""
        if name in self.given:
            return self.given[name]
        if name in self.defined:
            return _evaluate(_parsed(self.defined[name]), self)
        return self.config.get(name)

    def holds(self, expression: str) -> bool:
        """Whether a condition is true."""
        return bool(_evaluate(_parsed(expression), self))

    def size(self, expression: str) -> int:
        """A dimension. Raises Missing with the key that does not say what it is."""
        value = _evaluate(_parsed(expression), self)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Missing(self._culprit(expression))
        return value

    def _culprit(self, expression: str) -> str:
        names = [node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)]
        for name in names:
            if name in self.defined:
                culprit = self._culprit(self.defined[name])
                if culprit:
                    return culprit
            elif type(self.value(name)) is not int:
                return name
        return ""


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _evaluate(node: ast.expr, keys: Keys) -> object:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return keys.value(node.id)
        case ast.Tuple():
            return tuple(_evaluate(item, keys) for item in node.elts)
        case ast.BinOp(left, ast.BitOr(), right):
            value = _evaluate(left, keys)
            return _evaluate(right, keys) if value is None else value
        case ast.BinOp():
            return _calculated(node, keys)
        case ast.BoolOp(ast.And(), values):
            return all(_evaluate(value, keys) for value in values)
        case ast.BoolOp(ast.Or(), values):
            return any(_evaluate(value, keys) for value in values)
        case ast.UnaryOp(ast.Not(), operand):
            return not _evaluate(operand, keys)
        case ast.IfExp():
            return _evaluate(node.body if _evaluate(node.test, keys) else node.orelse, keys)
        case ast.Compare(left, [compared], [right]):
            return _compared(compared, _evaluate(left, keys), _evaluate(right, keys))
        case ast.Call(ast.Name("len"), [argument]):
            value = _evaluate(argument, keys)
            return len(cast("list[object]", value)) if isinstance(value, list | dict) else None
        case _:
            raise NotImplementedError(ast.unparse(node))


def _calculated(node: ast.BinOp, keys: Keys) -> int | None:
    left, right = _evaluate(node.left, keys), _evaluate(node.right, keys)
    if not isinstance(left, int) or not isinstance(right, int):
        return None
    match node.op:
        case ast.Add():
            return left + right
        case ast.Mult():
            return left * right
        case ast.FloorDiv():
            return left // right if right else None
        case ast.Mod():
            return left % right if right else None
        case _:
            raise NotImplementedError(ast.unparse(node))


def _compared(compared: ast.cmpop, left: object, right: object) -> bool:
    match compared:
        case ast.Eq():
            return left == right
        case ast.NotEq():
            return left != right
        case ast.Gt():
            return isinstance(left, int) and isinstance(right, int) and left > right
        case ast.In():
            if isinstance(right, str):
                return isinstance(left, str) and left in right
            return left in cast("tuple[object, ...]", right) if isinstance(right, list | tuple) else False
        case _:
            raise NotImplementedError(type(compared).__name__)


@dataclass(frozen=True, slots=True)
class Line:
    """One line, and the lines indented below it."""

    name: str
    dimensions: tuple[str, ...]
    bias: str | None  # the condition, "" for always; None: no bias
    conditions: tuple[str, ...]
    below: tuple[Line, ...]

    def applies(self, keys: Keys) -> bool:
        """Whether the model has it."""
        return all(
            not keys.holds(condition[1:]) if condition.startswith("!") else keys.holds(condition)
            for condition in self.conditions
        )


@cache
def _lines(template: str) -> tuple[Line, ...]:
    rows = [row for row in template.splitlines() if row.strip()]
    found: list[Line] = []
    while rows:
        row = rows.pop(0)
        below: list[str] = []
        while rows and rows[0].startswith(INDENT):
            below.append(rows.pop(0).removeprefix(INDENT))
        found.append(replace(_line(row), below=_lines("\n".join(below))))
    return tuple(found)


def _line(row: str) -> Line:
    name, *words = row.split()
    biases = [word[1:] for word in words if word.startswith("+")]
    conditions = tuple(word[1:] for word in words if word.startswith("?"))
    dimensions = tuple(word for word in words if word[0] not in "+?")
    return Line(name, dimensions, biases[0] if biases else None, conditions, ())


Parameters = Iterator[tuple[str, tuple[int, ...]]]


def expand(template: str, base: str, keys: Keys) -> Parameters:
    """Name and shape of every parameter, in the template's order; `base` comes in at `**`. Raises Missing."""
    for line in _lines(template):
        if line.applies(keys):
            yield from _expanded(line, base, keys)


def _expanded(line: Line, base: str, keys: Keys) -> Parameters:
    if line.name.endswith("**"):
        prefix = line.name.removesuffix("**")
        yield from ((prefix + name, shape) for name, shape in expand(base, "", keys))
    elif "*" in line.name:
        yield from _repeated(line, keys)
    elif line.name.startswith("@"):
        yield line.name[1:], tuple(map(keys.size, line.dimensions))
    else:
        shape = tuple(map(keys.size, line.dimensions))
        yield f"{line.name}.weight", shape
        if line.bias is not None and (not line.bias or keys.holds(line.bias)):
            yield f"{line.name}.bias", shape[:1]


def _repeated(line: Line, keys: Keys) -> Parameters:
    times = keys.size(line.dimensions[0])
    if times > MAX_REPEATS:
        raise Missing(line.dimensions[0])
    for index in range(times):
        path = line.name.replace("*", str(index))
        inner = replace(keys, given={"layer": index, **keys.given})
        for child in line.below:
            if child.applies(inner):
                yield from ((f"{path}.{name}", shape) for name, shape in _expanded(child, "", inner))
