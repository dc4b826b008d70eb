"""The command line: each command is one call of the API. Results go to stdout, messages to stderr."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

import surgery
from surgery.errors import Problem, SurgeryError
from surgery.escapes import escaped
from surgery.sizes import format_decimal
from surgery.workplace import remove_temporaries

if TYPE_CHECKING:
    from collections.abc import Generator

    from surgery.write import ProgressReport

__all__ = ["main", "run"]

GARBAGE_THRESHOLD = 200_000  # objects: to look through what importing torch makes, again and again, takes 0.2 s

P = ParamSpec("P")
R = TypeVar("R")


def _fail(error: SurgeryError) -> None:
    for problem in error.problems:
        click.echo(str(problem), err=True)
    sys.exit(1)


def _reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Exit code 1 with what, where and how to mend it, for every error of ours, and for a signal at once."""
    import functools

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return _unattended(partial(command, *args, **kwargs))
        except SurgeryError as error:
            _fail(error)
            raise
        except KeyboardInterrupt:
            _stopped(str(kwargs["out"]) if command.__name__ == "apply" else "")
            raise

    return run


def _unattended(do: Callable[[], R]) -> R:
    """What `do` gives, in a thread that a signal need not wait for: a run may be killed at any moment."""
    context = click.get_current_context()
    future: Future[R] = Future()

    def work() -> None:
        try:
            with context.scope(cleanup=False):
                future.set_result(do())
        except BaseException as error:  # raised again by whoever waits
            future.set_exception(error)

    threading.Thread(target=work, name="surgery-command", daemon=True).start()
    return future.result()


def _stopped(out: str) -> None:
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True).show_cursor()  # which the bar has hidden
    kept = ""
    if out and surgery.resumable(out):
        kept = f": what is done is kept beside {out}, and the same command with --resume goes on from there"
    click.echo(f"stopped{kept}", err=True)
    remove_temporaries()
    sys.exit(1)


def _settings(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    del context, parameter
    settings: dict[str, str] = {}
    for value in values:
        name, equals, setting = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE")
        settings[name] = setting
    return settings


_set_option = click.option(
    "--set", "settings", multiple=True, callback=_settings, metavar="NAME=VALUE", help="Set a parameter of the spec."
)


_download_option = click.option(
    "--download", is_flag=True, help="Fetch what is on the Hub to its client's cache first, and keep it there."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-surgery", prog_name="surgery")
def main() -> None:
    """Declarative model surgery on safetensors checkpoints."""
    signal.signal(signal.SIGTERM, _terminated)


def run() -> None:
    """The `surgery` command: `main`, without the wait while the interpreter takes torch apart."""
    _open_standard_streams()
    gc.set_threshold(GARBAGE_THRESHOLD)
    code: object = 1
    try:
        main(prog_name="surgery")
    except SystemExit as exit:
        code = exit.code
    except OSError as error:  # what we print on is gone or full
        with suppress(OSError):
            click.echo(f"error: cannot print: {error.strerror}", err=True)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _open_standard_streams() -> None:
    """A closed stream leads nowhere, so that no file of ours gets its number; what cannot be encoded is shown as ?."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # pyright: ignore[reportUnnecessaryComparison] # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # pyright: ignore[reportUnnecessaryComparison] # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _terminated(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt


@main.command()
@click.argument("specs", nargs=-1, required=True)
@click.option("--format", "style", type=click.Choice(["text", "json", "github"]), default="text", help="How to report.")
@_set_option
def validate(specs: tuple[str, ...], style: str, settings: dict[str, str]) -> None:
    """Check specs against the schema and themselves; opens no source."""
    problems: tuple[Problem, ...] = ()
    try:
        surgery.validate(specs, **settings)
    except SurgeryError as error:
        problems = error.problems
    if style == "json":
        click.echo(json.dumps([{"what": item.what, "at": item.at, "fix": item.fix} for item in problems], indent=1))
    for problem in problems if style != "json" else ():
        click.echo(_github(problem) if style == "github" else str(problem), err=style == "text")
    if problems:
        sys.exit(1)
    if style == "text":
        click.echo(f"{len(specs)} valid")


def _github(problem: Problem) -> str:
    """A workflow command: GitHub shows it beside the line.

    Source: `escapeData` and `escapeProperty` of GitHub's toolkit, packages/core/src/command.ts.
    """
    place, _, _ = problem.at.partition(", ")
    file, _, line = place.rpartition(":")
    numbered = line.isascii() and line.isdigit()
    properties = {"file": file if numbered else place, **({"line": line} if numbered else {})}
    where = ",".join(f"{key}={_workflow_text(value, ':,')}" for key, value in properties.items())
    message = "\n".join(filter(None, (problem.what, problem.fix)))
    return f"::error {where}::{_workflow_text(message)}"


def _workflow_text(text: str, separators: str = "") -> str:
    return "".join(f"%{ord(char):02X}" if char in f"%\r\n{separators}" else escaped(char) for char in text)


@main.command()
@click.argument("spec")
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
@click.option("--config-only", is_flag=True, help="From config.json alone: no weights need to be there.")
@_download_option
@_set_option
@_reporting
def plan(spec: str, as_json: bool, config_only: bool, download: bool, settings: dict[str, str]) -> None:
    """Say what would change, from headers alone."""
    made = surgery.plan(surgery.load(spec, **settings), config_only=config_only, download=download)
    click.echo(json.dumps(made.to_json(), indent=1) if as_json else str(made))


@main.command()
@click.argument("spec")
@click.option("-o", "--output", "out", required=True, type=click.Path(), help="The directory to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--memory", default="2GiB", show_default=True, help="What may be held beyond the imports.")
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Compute threads. [default: cores]")
@click.option(
    "--resume", is_flag=True, help="Go on where a run of the same plan was stopped; refuse what another left."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, at the end.")
@click.option("--hash-sources", is_flag=True, help="Note the sha256 of every source file in the manifest.")
@_download_option
@_set_option
@_reporting
def apply(
    spec: str,
    out: str,
    device: str,
    memory: str,
    workers: int | None,
    resume: bool,
    overwrite: bool,
    hash_sources: bool,
    download: bool,
    settings: dict[str, str],
) -> None:
    """Plan, then stream the result to OUT."""
    made = surgery.plan(surgery.load(spec, **settings), download=download)
    click.echo(str(made))
    with _progress() as report:
        manifest = surgery.apply(
            made, out, memory=memory, workers=workers, device=device, overwrite=overwrite, resume=resume,
            hash_sources=hash_sources, report=_from_where(report),
        )  # fmt: skip
    click.echo(str(manifest))
    click.echo(f"wrote {out}", err=True)


def _from_where(report: ProgressReport) -> ProgressReport:
    """The same, which says first what an earlier run has written, if anything."""
    is_begun = False

    def reporting(done: int, total: int) -> None:
        nonlocal is_begun
        if done and not is_begun:
            there, in_all = format_decimal(done), format_decimal(total)
            click.echo(f"going on where a run was stopped: {there} of {in_all} are written", err=True)
        is_begun = True
        report(done, total)

    return reporting


@contextmanager
def _progress() -> Generator[ProgressReport]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("writing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@main.command()
@click.argument("out", type=click.Path())
@click.option("--reproduce", is_flag=True, help="Also make it again, and compare.")
@click.option("--source", type=click.Path(), default=None, help="Where the local source lies, for --reproduce.")
@click.option("--model", "models", multiple=True, metavar="NAME=PATH", help="Where a local model of the spec lies.")
@_reporting
def verify(out: str, reproduce: bool, source: str | None, models: tuple[str, ...]) -> None:
    """Hash OUT anew and hold it against its manifest."""
    from surgery.card import has_card

    if (source is not None or models) and not reproduce:
        raise click.UsageError("--source and --model go with --reproduce")
    places = {name: place for name, _, place in (model.partition("=") for model in models)}
    manifest = surgery.verify(out, reproduce=reproduce, source=source, models=places)
    num_bytes = sum(file.num_bytes for file in manifest.files)
    again = ", and made again byte for byte" if reproduce else ""
    card = "; README.md is the card of its push" if has_card(Path(out), manifest) else ""
    counts = f"{len(manifest.files)} files, {len(manifest.tensors)} tensors, {format_decimal(num_bytes)}"
    click.echo(f"{counts}: as written{again}{card}")


@main.command()
@click.argument("out", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Where the repository is made: for its members only.")
@click.option("--revision", default="", metavar="BRANCH", help="The branch to commit to. [default: main]")
@_reporting
def push(out: str, repo: str, private: bool, revision: str) -> None:
    """Verify OUT, and commit it to the Hub's REPO (org/name) with a model card."""
    click.echo(surgery.push(out, repo, private=private, revision=revision))


@main.command()
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_reporting
def inspect(checkpoint: str, as_json: bool) -> None:
    """Show a checkpoint's module tree, types, sizes and quantization."""
    found = surgery.inspect(checkpoint)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--memory", default="2GiB", show_default=True, help="What may be held beyond the imports.")
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Compute threads. [default: cores]")
@click.option("--json", "as_json", is_flag=True, help="All figures as JSON.")
@click.option("--exit-code", "by_code", is_flag=True, help="Exit with 1 if they differ.")
@_reporting
def diff(a: str, b: str, memory: str, workers: int | None, as_json: bool, by_code: bool) -> None:
    """Say what checkpoint B adds to A, drops and changes, and by how much."""
    with _progress() as report:
        found = surgery.diff(a, b, memory=memory, workers=workers, report=report)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))
    if by_code and found.differs:
        sys.exit(1)


@main.command(name="import-mergekit")
@click.argument("config", type=click.Path())
@_reporting
def import_mergekit(config: str) -> None:
    """Turn a mergekit configuration into a spec."""
    click.echo(surgery.import_mergekit(config), nl=False)


@main.command()
@click.argument("name", required=False)
@_reporting
def ops(name: str | None) -> None:
    """List the ops, or show one op's manual."""
    click.echo(surgery.ops(name))


@main.command()
@_reporting
def schema() -> None:
    """Print the JSON Schema of the spec."""
    click.echo(json.dumps(surgery.schema(), indent=2))
