"""mergekit's merge methods and what each takes, as data: names, scopes and defaults of mergekit 0.1.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["METHODS", "Method", "Parameter", "known_parameters"]

Kind = Literal["number", "whole", "flag"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter; `default` None: it must be given."""

    name: str
    kind: Kind = "number"
    default: float | bool | None = None
    per_model: bool = False
    key: str = ""  # what our op calls it, if otherwise
    without_effect: bool = False  # in mergekit too

    @property
    def ours(self) -> str:
        """Its key in our op."""
        return self.key or self.name


@dataclass(frozen=True, slots=True)
class Method:
    """One `merge_method`: our op, what it takes, and what a base is to it.

    `base`: `required` and apart from the models, `optional` and apart from them, or `counted`: one model as others.
    """

    op: str
    base: Literal["required", "optional", "counted"]
    parameters: tuple[Parameter, ...]
    least: int = 0  # models beside the base
    most: int = 0  # 0: any number

    def find(self, name: str) -> Parameter | None:
        """Its parameter `name`."""
        return next((item for item in self.parameters if item.name == name), None)


def _flag(name: str, default: bool, *, without_effect: bool = False) -> Parameter:
    return Parameter(name, "flag", default, without_effect=without_effect)


_WEIGHT = Parameter("weight", per_model=True)
_INT8 = _flag("int8_mask", False, without_effect=True)  # the dtype of a mask of signs
_GAMMA = Parameter("gamma", default=0.01, per_model=True)
_EPSILON = Parameter("epsilon", default=0.15, per_model=True)


def _task_vectors(op: str, normalize: bool, rescale: bool, *more: Parameter, prunes: bool = True) -> Method:
    return Method(
        op,
        "required",
        (
            _WEIGHT,
            Parameter("density", default=1.0, per_model=True, without_effect=not prunes),
            *more,
            _flag("normalize", normalize),
            _flag("rescale", rescale, without_effect=not prunes),
            Parameter("lambda", default=1.0),
            _INT8,
        ),
    )


METHODS: dict[str, Method] = {
    "linear": Method("merge.linear", "counted", (_WEIGHT, _flag("normalize", True))),
    "slerp": Method("merge.slerp", "required", (Parameter("t"),), least=1, most=1),
    "nuslerp": Method(
        "merge.nuslerp",
        "optional",
        (_WEIGHT, _flag("nuslerp_flatten", True), _flag("nuslerp_row_wise", False)),
        least=2,
        most=2,
    ),
    "multislerp": Method(
        "merge.multislerp",
        "optional",
        (_WEIGHT, _flag("normalize_weights", True), Parameter("eps", default=1e-8)),
        least=1,
    ),
    "karcher": Method("merge.karcher", "counted", (Parameter("max_iter", "whole", 10), Parameter("tol", default=1e-5))),
    "task_arithmetic": _task_vectors("merge.task_arithmetic", False, False, prunes=False),
    "ties": _task_vectors("merge.ties", True, False),
    "dare_linear": _task_vectors("merge.dare_linear", False, True),
    "dare_ties": _task_vectors("merge.dare_ties", False, True),
    "breadcrumbs": _task_vectors("merge.breadcrumbs", False, False, _GAMMA),
    "breadcrumbs_ties": _task_vectors("merge.breadcrumbs_ties", False, False, _GAMMA),
    "della": _task_vectors("merge.della", True, True, _EPSILON),
    "della_linear": _task_vectors("merge.della_linear", False, True, _EPSILON),
    "model_stock": Method("merge.model_stock", "required", (_flag("filter_wise", False),), least=2),
    "sce": Method("merge.sce", "required", (Parameter("select_topk", default=1.0), _INT8)),
    "nearswap": Method("merge.nearswap", "required", (Parameter("t"),), least=1, most=1),
    "arcee_fusion": Method("merge.arcee_fusion", "required", (), least=1, most=1),
    "ram": Method("merge.ram", "required", (Parameter("epsilon", default=1e-5),)),
    "ramplus_tl": Method(
        "merge.ramplus",
        "required",
        (Parameter("r", default=0.1), Parameter("alpha", default=0.2), Parameter("epsilon", default=1e-5)),
    ),
    "passthrough": Method("layers.select", "counted", (Parameter("scale", default=1.0, per_model=True),)),
}


def known_parameters() -> tuple[str, ...]:
    """The parameters of all methods."""
    return tuple(dict.fromkeys(item.name for method in METHODS.values() for item in method.parameters))
