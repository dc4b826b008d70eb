"""A checkpoint's tensors as floats, so that what is quantized can be changed; and back again.

Why f32: PEFT adds to the dequantized weight in f32 and quantizes the sum, which is rounded to no other dtype between.
Source: PEFT 0.21, `lora.Linear4bit.merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint.modules import Module
from surgery.formats.bitsandbytes import Dequantize4bit, Quantize4bit, dequantized, quantized
from surgery.graph import Node, Source, toposort
from surgery.numerics.cast import Cast
from surgery.numerics.transpose import Transpose
from surgery.op import Rewrite, Scene, Site
from surgery.types import DType

__all__ = ["Floats"]


@dataclass(frozen=True, slots=True)
class Floats:
    """The tensors of a scene by name, 4-bit weights as what they dequantize to, in f32."""

    scene: Scene
    nodes: Mapping[str, Node]
    quantized: Mapping[str, tuple[Site, Rewrite]]  # by the weight's name

    @classmethod
    def of(cls, scene: Scene) -> Floats:
        """The floats of `scene`. Raises OpError for a 4-bit weight that does not hold together."""
        quantized: dict[str, tuple[Site, Rewrite]] = {}
        parts: dict[str, str] = {}
        for module in scene.modules.values():
            if module.is_quantized:
                nodes = {name: scene.names[name] for name in module.tensors}
                site = Site(module.path, module, nodes, "", None, scene)
                rewrite = dequantized(site, DType.F32)
                quantized[f"{module.path}.weight"] = (site, rewrite)
                parts |= dict.fromkeys(rewrite.takes, f"{module.path}.weight")
        nodes = {
            name: quantized[name][1].gives[name] if name in quantized else node
            for name, node in scene.names.items()
            if parts.get(name, name) == name
        }
        return cls(scene, nodes, quantized)

    def rewrite(self, changed: list[str], nodes: Mapping[str, Node], *, requantize: bool) -> Rewrite:
        """What becomes of the names when the tensors `changed` are those of `nodes`."""
        takes: list[str] = []
        gives: dict[str, Node] = {}
        for name in changed:
            if name in self.quantized:
                site, rewrite = self.quantized[name]
                takes += rewrite.takes
                gives |= _packed(site, name, rewrite.gives[name], nodes[name], requantize=requantize)
            else:
                takes += [name] if name in self.scene.names else []
                gives[name] = nodes[name]
        if not takes:  # new names alone come after the last one
            takes = list(self.scene.names)[-1:]
            gives = {takes[0]: self.scene.names[takes[0]], **gives}
        used = {node for node in toposort(gives.values()) if isinstance(node.kernel, Source)}
        lost = [name for name in takes if _sources(self.scene.names[name]).isdisjoint(used)]
        return Rewrite(tuple(takes), gives, tuple(lost))


def _sources(node: Node) -> set[Node]:
    return {below for below in toposort([node]) if isinstance(below.kernel, Source)}


def _packed(site: Site, name: str, floats: Node, folded: Node, *, requantize: bool) -> Mapping[str, Node]:
    """The folded weight of a module that was in 4 bits: in the same format again, or as floats."""
    below = floats.inputs[0] if isinstance(floats.kernel, Transpose) else floats
    assert isinstance(below.kernel, Dequantize4bit)
    record = below.kernel.record
    if not requantize:
        return {name: site.graph.apply(Cast(record.weight.dtype), folded)[0]}
    module = Module(site.path, site.module.kind, {name: folded.type})
    plain = Site(site.path, module, {name: folded}, site.touched_by, None, site.scene)
    kernel = Quantize4bit(record.quant_type, record.block_size, record.double_quant)
    return quantized(plain, kernel).gives
