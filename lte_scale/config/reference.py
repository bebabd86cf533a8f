"""The reference page of all keys, generated from the schema: `python -m lte_scale.config.reference`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lte_scale.config.load import bounds
from lte_scale.config.schema import Config


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `lte_scale/config` by `make docs`. A YAML file holds these sections; on the command",
        "line `section.key=value` overrides one. `lte-scale train CONFIG --print-config` prints what a run would use.",
        "",
        "## Run",
        "",
        *_table(Config, ""),
    ]
    for field in dataclasses.fields(Config):
        section: Any = field.default_factory
        if dataclasses.is_dataclass(section):
            lines += ["", f"## {field.name}", "", str(section.__doc__), "", *_table(section, f"{field.name}.")]
    return "\n".join(lines) + "\n"


def _table(section: Any, prefix: str) -> list[str]:
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    default = section()
    for field in dataclasses.fields(section):
        if "doc" not in field.metadata:
            continue
        one_of = field.metadata["one_of"]
        allowed = ", ".join(f"`{value}`" for value in one_of) if one_of else bounds(field)
        value = json.dumps(getattr(default, field.name))
        rows.append(f"| `{prefix}{field.name}` | `{value}` | {allowed} | {field.metadata['doc']} |")
    return rows


if __name__ == "__main__":
    print(markdown(), end="")
