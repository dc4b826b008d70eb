"""What every merge shares: its operands, its numbers over depth and names, and what it refuses."""

from surgery.merging.edit import Merge, Recipe, models_field, number_field
from surgery.merging.schedule import Depths, Schedule

__all__ = ["Depths", "Merge", "Recipe", "Schedule", "models_field", "number_field"]
