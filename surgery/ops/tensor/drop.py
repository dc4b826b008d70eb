"""`tensor.drop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.op import Op, Rewrite, Selects, Site


@dataclass(frozen=True, slots=True)
class Drop(Op):
    """Tensors left out of the output.

    Reads    a tensor of any type
    Writes   nothing; the manifest lists what was dropped
    Raises   OpError when a part of a quantized weight is dropped without its other parts
    """

    selects: ClassVar[Selects] = "tensors"

    def rewrite(self, site: Site) -> Rewrite:
        """Nothing in the tensor's place."""
        return Rewrite((site.path,), {}, drops=(site.path,))
