"""`tensor.rename`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from surgery.checkpoint.header import MAX_NAME, METADATA_KEY, is_name
from surgery.formats.bitsandbytes import is_bitsandbytes, patch_config
from surgery.op import Finished, Op, Rewrite, Selects, Site, doc


@dataclass(frozen=True, slots=True)
class Rename(Op):
    r"""Tensors under new names.

    Reads    a tensor of any type
    Writes   the same bytes under the name that `to` gives; `\1`, `\g<name>` stand for the groups of
             the regex that matched
             config.json  llm_int8_skip_modules follows, in a checkpoint quantized with bitsandbytes
    Raises   OpError for two tensors with one name, or a quantized weight torn from its parts
    """

    selects: ClassVar[Selects] = "tensors"

    to: str = field(metadata=doc(r"The new name; `\1` is the regex's first group.", examples=(r"model.\1",)))

    def check(self, patterns: tuple[re.Pattern[str], ...]) -> str:
        """`to` may only use groups that every regex has."""
        if re.search(r"\\[^\dg]", self.to):
            return f"`to` is `{self.to}`: it is a template, no regex; a backslash names a group"
        if len(self.to) > MAX_NAME:
            return f"`to` has {len(self.to)} characters, and a name at most {MAX_NAME}"
        for pattern in patterns:
            try:
                _groups_of(pattern).sub(self.to, "")
            except (re.error, IndexError) as error:
                return f"{error}: `to` is {self.to!r}, the regex `{pattern.pattern}` has {pattern.groups} groups"
        return ""

    def rewrite(self, site: Site) -> Rewrite:
        """The tensor under its new name."""
        assert site.match is not None
        name = site.match.expand(self.to)
        if not is_name(name) or name == METADATA_KEY:
            raise site.refuse(
                f"would be renamed to {name[:MAX_NAME]!r}", "give a name that a safetensors file can hold"
            )
        return Rewrite((site.path,), {name: site.nodes[site.path]})

    def config(self, config: Mapping[str, object], finished: Finished) -> Mapping[str, object]:
        """Skips follow the new names."""
        return patch_config(config, finished, {}) if is_bitsandbytes(config) else config


def _groups_of(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """A regex with the same groups that matches at once."""
    names = {index: f"?P<{name}>" for name, index in pattern.groupindex.items()}
    return re.compile("".join(f"({names.get(index, '')})" for index in range(1, pattern.groups + 1)))
