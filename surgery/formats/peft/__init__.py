"""PEFT adapters (`adapter_config.json`, `adapter_model.safetensors`) as patches on the tensors of a base.

`read_adapter` reads one, `Adapter.patches` holds it against a base, `Patch.apply` makes the node of a folded tensor.
The bits are those of PEFT's `merge_and_unload()` on a CPU with one thread, but for what a kernel says of itself.
Source: PEFT 0.21.
"""

from surgery.formats.peft.adapter import Adapter, read_adapter, refuse_other_base
from surgery.formats.peft.floats import Floats
from surgery.formats.peft.patch import Patch
from surgery.formats.peft.ties import Tied

__all__ = ["Adapter", "Floats", "Patch", "Tied", "read_adapter", "refuse_other_base"]
