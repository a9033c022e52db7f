"""config.json as typed, bounded fields; what nobody asked for is reported, never silently ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyruntime.errors import UsageError
from pyruntime.spec.bounds import check_bool, check_int, check_real

_REQUIRED: Any = object()


class Fields:
    """Typed access to the keys of a configuration, `where` in its files. null stands for None, and for nothing else.

    `layer(i)` gives the same fields with the overrides of layer i; which keys were asked for is shared by all views.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        overrides: Mapping[int, Mapping[str, Any]] | None = None,
        used: set[str] | None = None,
        where: str = "config.json",
    ) -> None:
        self._where = where
        self._data = data
        self._overrides = overrides or {}
        self._used: set[str] = set() if used is None else used

    def layer(self, index: int) -> Fields:
        """The fields as layer `index` sees them."""
        return Fields({**self._data, **self._overrides.get(index, {})}, {}, self._used, self._where)

    def with_layer_overrides(self, overrides: Mapping[int, Mapping[str, Any]]) -> Fields:
        """The same fields, with `overrides` by layer index behind `layer`.

        Where a key lists a value per layer, its first one stands for the model as a whole.
        """
        first = overrides.get(0, {})
        whole = {
            key: first[key] if isinstance(value, list) and key in first else value for key, value in self._data.items()
        }
        return Fields(whole, overrides, self._used, self._where)

    def inner(self, name: str) -> Fields | None:
        """The fields of the object `name`, or None where it is absent or empty. Raises UsageError CONFIG."""
        value = self.raw(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise UsageError("CONFIG", f"{self._where}: {name} is {str(value)[:80]!r}; expected an object")
        return Fields(value, where=f"{self._where} {name}")

    def has_objects(self) -> bool:
        """Whether any value is an object."""
        return any(isinstance(value, dict) for value in self._data.values())

    def equals(self, other: Fields) -> bool:
        """Whether both have the same keys and values."""
        return self._data == other._data

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or `default`."""
        self._used.add(name)
        value = self._data.get(name)
        return default if value is None else value

    def optional(self, name: str, default: Any) -> Any:
        """The value as it stands, null included; `default` only where the key is absent."""
        self._used.add(name)
        return self._data.get(name, default)

    def integer(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        """An int in [low, high], or `default`. Raises UsageError CONFIG."""
        return self._checked(name, default, lambda value: check_int(name, value, low, high))

    def real(self, name: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
        """A finite float, low < value <= high, or `default`. Raises UsageError CONFIG."""
        return self._checked(name, default, lambda value: check_real(name, value, low, high))

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false, or `default`. Raises UsageError CONFIG."""
        return self._checked(name, default, lambda value: check_bool(name, value))

    def choice(self, name: str, choices: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """The entry of `choices` that the text names. Raises UsageError CONFIG that lists them."""

        def pick(value: Any) -> Any:
            if not isinstance(value, str) or value not in choices:
                raise UsageError("CONFIG", f"{name} is {str(value)[:80]!r}; supported: {', '.join(choices)}")
            return choices[value]

        return self._checked(name, default, pick)

    def unused(self) -> tuple[str, ...]:
        """Keys with a value that nobody asked for."""
        return tuple(sorted(key for key, value in self._data.items() if value is not None and key not in self._used))

    def used(self) -> frozenset[str]:
        """Keys with a value that somebody asked for."""
        return frozenset(key for key in self._used if self._data.get(key) is not None)

    def ignore(self, names: frozenset[str]) -> None:
        """Count `names` as asked for: they are known to have no influence on the result."""
        self._used |= names

    def _checked(self, name: str, default: Any, check: Any) -> Any:
        self._used.add(name)
        if name not in self._data and default is _REQUIRED:
            raise UsageError("CONFIG", f"{self._where} has no {name}; it is required")
        value = self._data.get(name)
        if name not in self._data or (value is None and default is None):
            return default
        if value is None:
            raise UsageError("CONFIG", f"{self._where}: {name} is null; give it a value, or leave the key out")
        try:
            return check(value)
        except UsageError as error:
            raise UsageError("CONFIG", f"{self._where}: {error}") from None


def some(names: Sequence[str], separator: str = ", ", width: int = 80) -> str:
    """The first ten of `names`, cut to `width`."""
    shown = [name[:width] if name.isprintable() else ascii(name[:width]) for name in names[:10]]
    return separator.join(shown) + (f"{separator}..." if len(names) > 10 else "")
