"""The loop: mutate, run, keep what reaches a line that nothing reached before."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

import surgery

from .mutation import Tree, mutated_bytes, mutated_tree
from .targets import Target

HOME = str(Path(surgery.__file__).parent)
MOST_SECONDS = 8.0  # of one input: regexes may take five
MOST_BYTES = 1 << 30  # that the process may come to hold beyond the start


@dataclass(frozen=True)
class Finding:
    """An input, and what it does that it must not do."""

    what: str
    content: bytes


@dataclass
class Result:
    """What a search came to."""

    executions: int = 0
    refused: int = 0
    lines: set[tuple[CodeType, int]] = field(default_factory=set)
    corpus: list[tuple[Tree | None, bytes]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    slowest: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.executions} executions, {self.refused} refused, {len(self.lines)} lines reached, "
            f"{len(self.corpus)} inputs kept, slowest {self.slowest:.2f} s, {len(self.findings)} findings"
        )


def search(target: Target, executions: int, seed: int, report: Callable[[str], None] = lambda text: None) -> Result:
    """Run `target` on so many inputs. The same seed gives the same inputs."""
    random, result = Random(seed), Result()
    start_bytes = _held_bytes()
    seen: set[str] = set()
    with target.prepared() as run:
        for tree in target.seeds:
            _execute(run, tree, target.encode(tree), result, seen)
        while result.executions < executions:
            _execute(run, *_next(target, result, random), result, seen)
            if result.executions % 10_000 == 0:
                report(str(result))
    if _held_bytes() - start_bytes > MOST_BYTES:
        result.findings.append(Finding("the process holds more than it may", b""))
    return result


def _next(target: Target, result: Result, random: Random) -> tuple[Tree | None, bytes]:
    tree, raw = random.choice(result.corpus)
    if tree is None or random.random() < 0.3:
        return None, mutated_bytes(raw, random, [content for _, content in result.corpus])
    changed = mutated_tree(tree, random, [other for other, _ in result.corpus if other is not None])
    return changed, target.encode(changed)


def _execute(run: Callable[[bytes], None], tree: Tree | None, content: bytes, result: Result, seen: set[str]) -> None:
    lines: set[tuple[CodeType, int]] = set()
    begun = time.perf_counter()
    what = _traced(run, content, lines)
    seconds = time.perf_counter() - begun
    result.executions += 1
    result.refused += what == "refused"
    result.slowest = max(result.slowest, seconds)
    if seconds > MOST_SECONDS:
        what = f"takes {seconds:.1f} s"
    if what not in ("", "refused") and what not in seen:
        seen.add(what)
        result.findings.append(Finding(what, content))
    if not lines <= result.lines or not result.corpus:
        result.lines |= lines
        result.corpus.append((tree, content))


def _traced(run: Callable[[bytes], None], content: bytes, lines: set[tuple[CodeType, int]]) -> str:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        lines.add((frame.f_code, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(content)
    except surgery.SurgeryError as error:
        return "refused" if str(error).isprintable() or "\x1b" not in str(error) else "prints what it should not"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]} at {_place(error)}"
    finally:
        sys.settrace(before)
    return ""


def _place(error: Exception) -> str:
    trace, place = error.__traceback__, ""
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(HOME):
            place = f"{code.co_filename.removeprefix(HOME)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _held_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
