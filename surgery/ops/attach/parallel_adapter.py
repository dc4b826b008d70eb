"""`attach.parallel_adapter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surgery.formats.adapterhub.bottleneck import PRESETS, Preset
from surgery.formats.bottleneck.attaching import BottleneckAttach
from surgery.formats.bottleneck.layout import Placement
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAdapter(BottleneckAttach):
    """New bottleneck adapters in parallel, ready to be trained: beside feed-forward sublayers, or single Linears.

    Reads    nothing but shapes; 4-bit bases are fine
    Writes   adapters/<name>/
             `sublayer`: as AdapterHub reads it (`load_adapter(..., use_safetensors=True)`)
               <slot>.adapters.<name>.adapter_down.0.weight  f32 [width, hidden],  .adapter_down.0.bias  f32 [width]
               <slot>.adapters.<name>.adapter_up.weight      f32 [hidden, width],  .adapter_up.bias      f32 [hidden]
             `linear`: in surgery's own layout, which surgery.runtime attaches to a live model
               <module>.adapter_down.weight  f32 [width, in],  .adapter_up.weight  f32 [out, width]
    Numbers  with A(z) = scaling·up(act(down z)), h what the feed-forward gives, x the residual before it:
             sublayer  h + A(x), x not normalised   (AdapterHub's par_bn)
             linear    Linear(x) + A(x)
             width = int(hidden // reduction_factor). Initial values depend on seed and name alone
    Mind     of `sublayer`, `modules` says which layers have an adapter: those that hold a module selected.
             On a classifier surgery.runtime freezes the head too, and does not save it (AdapterHub's train_adapter
             leaves it trainable): after attaching, `model.classifier.requires_grad_(True)`, and save it yourself
    Raises   OpError for an architecture whose slots are not known; a norm, an embedding, a convolution, an expert or
             a head where a Linear is meant; a width larger than the features
    Source   He et al., arXiv 2110.04366; Hu et al., 2304.01933; adapters 1.3.0
    """

    placement: Literal["sublayer", "linear"] = field(
        default="sublayer",
        metadata=doc("Beside the feed-forward of each layer, or beside each Linear of `modules`."),
    )

    def method(self) -> Preset | Placement:
        """AdapterHub's configuration, or where the adapter is at single Linears."""
        return PRESETS["par_bn"] if self.placement == "sublayer" else "parallel"
