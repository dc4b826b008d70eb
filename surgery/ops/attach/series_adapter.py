"""`attach.series_adapter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surgery.formats.adapterhub.bottleneck import PRESETS, Preset
from surgery.formats.bottleneck.attaching import BottleneckAttach
from surgery.formats.bottleneck.layout import Placement
from surgery.op import doc


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesAdapter(BottleneckAttach):
    """New bottleneck adapters in series, ready to be trained: after sublayers, or before or after single Linears.

    Reads    nothing but shapes; 4-bit bases are fine
    Writes   adapters/<name>/
             `houlsby`, `pfeiffer`: as AdapterHub reads it (`load_adapter(..., use_safetensors=True)`)
               <slot>.adapters.<name>.adapter_down.0.weight  f32 [width, hidden],  .adapter_down.0.bias  f32 [width]
               <slot>.adapters.<name>.adapter_up.weight      f32 [hidden, width],  .adapter_up.bias      f32 [hidden]
             `before`, `after`: in surgery's own layout, which surgery.runtime attaches to a live model
               <module>.adapter_down.weight  f32 [width, features],  .adapter_up.weight  f32 [features, width]
    Numbers  with A(z) = scaling·up(act(down z)), h what a sublayer gives, x the residual before it, LN its norm:
             houlsby   h + A(h), after attention and after the feed-forward   (AdapterHub's double_seq_bn)
             pfeiffer  h + A(LN(h + x)), after the feed-forward               (seq_bn; without LN in pre-norm models)
             before    Linear(x + A(x))
             after     y + A(y), y what the Linear gives
             width = int(hidden // reduction_factor). Initial values depend on seed and name alone
    Mind     of a slot placement, `modules` says which layers have an adapter: those that hold a module selected.
             `init: bert` is no no-op, in AdapterHub neither.
             On a classifier surgery.runtime freezes the head too, and does not save it (AdapterHub's train_adapter
             leaves it trainable): after attaching, `model.classifier.requires_grad_(True)`, and save it yourself
    Raises   OpError for an architecture whose slots are not known; a norm, an embedding, a convolution, an expert or
             a head where a Linear is meant; a width larger than the model's
    Source   Houlsby et al., arXiv 1902.00751; Pfeiffer et al., 2005.00247; Hu et al., 2304.01933; adapters 1.3.0
    """

    placement: Literal["pfeiffer", "houlsby", "before", "after"] = field(
        default="pfeiffer",
        metadata=doc("One adapter for each layer, two, or one `before` or `after` each Linear of `modules`."),
    )

    def method(self) -> Preset | Placement:
        """AdapterHub's configuration, or where the adapter is at single Linears."""
        if self.placement == "before" or self.placement == "after":
            return self.placement
        return PRESETS["seq_bn" if self.placement == "pfeiffer" else "double_seq_bn"]
