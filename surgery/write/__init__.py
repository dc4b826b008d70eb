"""Writing an output: weights, side files and manifest into a hidden sibling, then one rename."""

from surgery.write.output import ProgressReport, write_output
from surgery.write.place import Workplace

__all__ = ["ProgressReport", "Workplace", "write_output"]
