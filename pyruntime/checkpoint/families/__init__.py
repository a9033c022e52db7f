"""One file per architecture family, and the table that finds a family by its model_type."""

from typing import Final

from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.llama import LLAMA

FAMILIES: Final[dict[str, Family]] = {name: family for family in (LLAMA,) for name in family.model_types}

__all__ = ["FAMILIES", "Family"]
