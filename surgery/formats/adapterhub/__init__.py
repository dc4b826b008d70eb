"""Adapters in the layout of AdapterHub's `adapters` library, held against PEFT's."""

from surgery.formats.adapterhub.convert import hub_config_of, peft_config_of, to_hub, to_peft
from surgery.formats.adapterhub.hub import RESERVED

__all__ = ["RESERVED", "hub_config_of", "peft_config_of", "to_hub", "to_peft"]
