"""`Spec`: source, ordered edits and output, checked against the schema, with the line of every value."""

from __future__ import annotations

from surgery.spec.load import load_spec
from surgery.spec.model import ALL_LINEAR, Edit, Patterns, Spec
from surgery.spec.schema import spec_schema

__all__ = ["ALL_LINEAR", "Edit", "Patterns", "Spec", "load_spec", "spec_schema"]
