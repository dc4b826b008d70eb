"""Two checkpoints held against each other: what was added, dropped and changed, and by how much.

Why a graph again: a pair of tensors under one kernel is a node like any other, so that reading ahead, the budget, the
Hub and 4-bit weights are the stream's, and nothing of them is written twice.
"""

from surgery.comparison.model import Comparison, ConfigDifference, Figures, Stored, TensorDifference

__all__ = ["Comparison", "ConfigDifference", "Figures", "Stored", "TensorDifference"]
