"""Inputs from inputs: one node of a tree exchanged for something nasty, or a few bytes."""

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

Tree = object

NASTY: tuple[Tree, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64 + 1, 10**400, -(10**400), 0.0, -0.0, 1.5, 1e308, float("nan"),
    float("inf"), "", " ", "a", ".", "..", "../x", "/etc/passwd", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "é",
    "x" * 600,
    "a." * 100, "9" * 5000, "(a+)+b", "(", "[", "*", "\\", "${x}", "all-linear", [], {}, [[]], [{}], {"": {}}, [0, 0],
    [-1], [1, 2, 3], [2**62, 4], ["a", "a"], {"a": 1},
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"null", b"true", b"1e999", b"-", b"NaN", b"\0", b"\xff",
    b"\n", b"\t", b"&a ", b"*a", b"<<", b"? ", b"!!int ", b"!!python/name:os.system ", b"| ", b"> ", b"- ", b"---\n",
    b"${", b"0x", b"1:30", b"2024-01-01", b"\\ud800", b"\\u0000", b"# ", b"%YAML 1.1\n", b"~", b"\xef\xbb\xbf", b"\r",
    b"\xc2\x85",
)  # fmt: skip


def mutated_tree(tree: Tree, random: Random, others: list[Tree]) -> Tree:
    """`tree` with one to three nodes changed."""
    result = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 2, 3))):
        result = _changed(result, random, others)
    return result


def _changed(tree: Tree, random: Random, others: list[Tree]) -> Tree:
    places = list(_places(tree))
    if not places:
        return random.choice(NASTY)
    parent, key = random.choice(places)
    action = random.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[str(random.choice(NASTY))[:700]] = parent[key]
    elif action == 1:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif action == 2:
        parent[key] = _near(parent[key], random)
    elif action == 3:
        other = list(_places(random.choice(others)))
        parent[key] = copy.deepcopy(random.choice([holder[at] for holder, at in other] or [None]))
    elif action == 4 and len(places) > 1:
        holder, at = random.choice(places)
        parent[key] = copy.deepcopy(holder[at])
    else:
        parent[key] = copy.deepcopy(random.choice(NASTY))
    return tree


def _near(value: Tree, random: Random) -> Tree:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value + random.choice((-1, 1, 4, 8)) if random.random() < 0.8 else -value
    if isinstance(value, str):
        at = random.randint(0, len(value))
        return value[:at] + str(random.choice(NASTY))[:50] + value[at + random.randint(0, 2) :]
    return [value] if random.random() < 0.5 else {"x": value}


def _places(tree: Tree) -> Iterator[tuple[Any, Any]]:
    """Containers in `tree`, each with one of its keys."""
    if isinstance(tree, dict):
        for key in list(tree):
            yield tree, key
            yield from _places(tree[key])
    elif isinstance(tree, list):
        for index in range(len(tree)):
            yield tree, index
            yield from _places(tree[index])


def mutated_bytes(raw: bytes, random: Random, others: list[bytes]) -> bytes:
    """`raw` with one to four places changed."""
    result = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randint(0, len(result))
        stop = min(len(result), at + random.choice((0, 1, 1, 2, 8, 32)))
        action = random.randrange(5)
        if action == 0:
            del result[at:stop]
        elif action == 1:
            result[at:stop] = random.choice(TOKENS)
        elif action == 2:
            result[at:at] = result[at:stop] * random.choice((1, 2, 50))
        elif action == 3 and at < len(result):
            result[at] ^= 1 << random.randrange(8)
        else:
            other = random.choice(others)
            start = random.randint(0, len(other))
            result[at:stop] = other[start : start + random.randint(0, 64)]
    return bytes(result[:100_000])
