"""What a field of the configuration is: a default, its documentation and its range."""

from __future__ import annotations

from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """One line that names the key, its value, what is allowed and what to do."""


def option(
    default: Any,
    doc: str,
    *,
    one_of: tuple[Any, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A documented dataclass field. `least` and `most` are inclusive bounds, `above` an exclusive lower one."""
    metadata = {"doc": doc, "one_of": one_of, "least": least, "above": above, "most": most}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
