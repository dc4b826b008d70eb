"""Declarative model surgery: YAML edits streamed over safetensors checkpoints.

spec = surgery.load("qlora.yaml", model="./llama")   # Spec
plan = surgery.plan(spec)                            # Plan; headers only
print(plan)                                          # what `surgery plan` prints
manifest = surgery.apply(plan, "out", memory="2GiB") # Manifest
surgery.verify("out")
"""

# A submodule that is imported later would take the place of the function that has its name.
import surgery.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from surgery import comparison_view as _comparison_view
from surgery import view as _view
from surgery.api import (
    apply,
    diff,
    import_mergekit,
    inspect,
    load,
    ops,
    plan,
    push,
    resumable,
    schema,
    validate,
    verify,
)
from surgery.errors import (
    CheckpointError,
    ConservationError,
    OpError,
    OutputError,
    Problem,
    SpecError,
    SurgeryError,
    VerifyError,
)

__all__ = [
    "CheckpointError",
    "ConservationError",
    "OpError",
    "OutputError",
    "Problem",
    "SpecError",
    "SurgeryError",
    "VerifyError",
    "apply",
    "diff",
    "import_mergekit",
    "inspect",
    "load",
    "ops",
    "plan",
    "push",
    "resumable",
    "schema",
    "validate",
    "verify",
]

_view.register()
_comparison_view.register()
