"""Merges as ours and as mergekit's: the same models, numbers and order on both sides."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.contest import Contender
from tests.peers import mergekit_python

IMPORTS = "import mergekit.scripts.run_yaml"
BASE = "base"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to merge: each model's numbers, `base` among them where it has any, and those of the whole merge."""

    name: str
    models: Mapping[str, Mapping[str, float]]
    shared: Mapping[str, float]

    @property
    def others(self) -> list[str]:
        """The models beside the base."""
        return [name for name in self.models if name != BASE]

    def spec(self, paths: Mapping[str, Path], compute_dtype: str = "float32") -> dict[str, object]:
        """For `surgery apply`."""
        names = {name: "source" if name == BASE else name for name in self.models}
        numbers: object = {names[name]: dict(given) for name, given in self.models.items()}
        if not any(self.models.values()):
            numbers = self.others
        edit = {"op": f"merge.{self.name}", "models": numbers, **self.shared, "compute_dtype": compute_dtype}
        models = {name: str(paths[name]) for name in self.others}
        return {"version": 1, "source": str(paths[BASE]), "models": models, "edits": [edit]}

    def config(self, paths: Mapping[str, Path], **dtypes: str) -> dict[str, object]:
        """For `mergekit-yaml`."""
        models = [{"model": str(paths[name]), "parameters": dict(given)} for name, given in self.models.items()]
        base = {} if self.name == "linear" else {"base_model": str(paths[BASE])}
        return {"merge_method": self.name, **base, "models": models, "parameters": dict(self.shared), **dtypes}


METHODS = {
    method.name: method
    for method in (
        Method("linear", {BASE: {"weight": 0.5}, "one": {"weight": 0.4}, "two": {"weight": 0.3}}, {}),
        Method("task_arithmetic", {"one": {"weight": 0.6}, "two": {"weight": 0.4}}, {}),
        Method("ties", {"one": {"weight": 0.6, "density": 0.5}, "two": {"weight": 0.4, "density": 0.5}}, {}),
        Method("slerp", {BASE: {}, "one": {}}, {"t": 0.4}),
    )
}


def write(path: Path, document: Mapping[str, object]) -> str:
    """As JSON, which is YAML; the path."""
    path.write_text(json.dumps(document, indent=1))
    return str(path)


def merging(config: str, out: Path, *options: str) -> Contender:
    """`mergekit-yaml`. Raises SystemExit where there is no mergekit."""
    python = mergekit_python()
    if python is None:
        raise SystemExit("no mergekit: set SURGERY_MERGEKIT_PYTHON, or install mergekit==0.1.5 into .venv-mergekit")
    command: Sequence[str] = (str(python.with_name("mergekit-yaml")), config, str(out), "--quiet", *options)
    return Contender(tuple(command), out, IMPORTS, str(python))
