"""A key of config.json as families name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json, and what holds where it is absent."""

    name: str
    default: Any = None

    def defaults(self) -> tuple[Any, ...]:
        """The default as an argument of Fields; none where the key is required."""
        return () if self.default is None else (self.default,)
