"""The inventory of a model: every parameter's name on disk, shape and dtype, from config.json alone.

Why: a plan needs names and shapes, not weights; and the order in which the live model holds its
modules, which decides who gets which random number, is in no checkpoint: a file's tensors are sorted.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.checkpoint.inventory.families import family_of, head_of, model_types, parameters
from surgery.checkpoint.inventory.order import live_order
from surgery.checkpoint.inventory.template import Missing
from surgery.errors import CheckpointError, Problem
from surgery.types import DType, TensorType

__all__ = ["inventory", "live_order", "model_types"]

DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16, "float64": DType.F64}


def inventory(config: Mapping[str, object]) -> dict[str, TensorType] | None:
    """Every parameter of the model that `config` describes, in the order of the live model; None if it is unknown.

    The model is that of the class in `architectures`, without it the family's usual one. Tied
    parameters are there once, experts one by one, as on disk. T5 counts as tied unless its config says
    `tie_word_embeddings: false`, as it does from 1.1 on: transformers v5 ties it whatever the config
    says, until it finds the head that these checkpoints hold.

    Raises CheckpointError for a class that the family does not have, a key that the config lacks, or
    a quantized checkpoint, whose tensors its config does not tell.
    """
    family = family_of(config)
    if family is None:
        return None
    if config.get("quantization_config"):
        what = "config.json says that the weights are quantized; how they are stored, it does not say"
        raise CheckpointError(Problem(what, fix="take the config of the checkpoint before quantization"))
    dtype = _dtype(config)
    try:
        return {name: TensorType(dtype, shape) for name, shape in parameters(family, head_of(family, config), config)}
    except Missing as missing:
        what = f"config.json has no fit `{missing}`, which the tensors of a {config['model_type']} depend on"
        raise CheckpointError(Problem(what)) from None


def _dtype(config: Mapping[str, object]) -> DType:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(Problem(f"config.json says `dtype: {name}`", fix=f"known: {', '.join(DTYPES)}"))
    return DTYPES[name]
