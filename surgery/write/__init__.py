"""Writing an output: weights, side files and manifest into a hidden sibling, then one rename."""

from surgery.write.output import ProgressReport, write_output

__all__ = ["ProgressReport", "write_output"]
