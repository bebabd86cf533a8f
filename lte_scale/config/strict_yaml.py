"""YAML as people expect it: the numbers of YAML 1.2, no key twice, and one line for whatever is wrong."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lte_scale.config.schema import ConfigError

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class StrictLoader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2, so that 1e-3 is one and 010 and 2026-11-23 are none.

    Refuses a key that is given twice.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.value.isprintable():
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # PyYAML lets what int(), float() and others raise for `!!int x`, and for more digits than Python reads, through
        try:
            value = super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except (ValueError, LookupError, AttributeError) as error:
            problem = f"{said(node.value)} is no valid {node.tag.removeprefix(_TAG)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > 1024:  # beyond a float
            problem = f"{said(node.value)} is too large a number"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


class StrictDumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as a number."""


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# The first form that matches counts: every whole number is a float, too.
StrictLoader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))  # type: ignore[no-untyped-call]
for _kind in (StrictLoader, StrictDumper):
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))  # type: ignore[no-untyped-call]


def parse(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: one line that begins with `where`.
    """
    try:
        return yaml.load(text, StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} is no valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: is no valid YAML: {str(error).splitlines()[0]}") from error


def said(value: Any) -> str:
    """A value as an error message names it."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
