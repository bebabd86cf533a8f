"""YAML files and `a.b=c` overrides into a `Config`, strictly: an error says what would have been understood."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lte_scale.config.checks import check
from lte_scale.config.methods import translated
from lte_scale.config.schema import Config, ConfigError
from lte_scale.config.strict_yaml import StrictDumper, parse, said

SHORTHANDS = {"engine": "name"}
"""Sections that may be given as one word, and the key that the word is for."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (none: the defaults) with `a.b=c` overrides.

    Raises:
        ConfigError: one line naming the key, the value, and what is allowed.
    """
    tree = {} if path is None else _read(Path(path))
    return overridden(typing.cast(Config, _section(Config, tree, "", "" if path is None else f"{path}: ")), overrides)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `a.b=c` overrides, checked.

    Raises:
        ConfigError: as `load_config`.
    """
    for override in overrides:
        config = _override(config, override)
    config = translated(config)
    check(config)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1) if missing else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}){hint}") from error
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: is {said(tree)}, not a mapping of sections such as `model:` and `merge:`")
    return tree


def _override(config: Config, text: str) -> Config:
    key, sign, value = text.partition("=")
    key = key.strip()
    where = f"override {said(text)}"
    if not sign or not key or not key.isprintable():
        raise ConfigError(f"{where}: write key=value, for example merge.every=50")
    return typing.cast(Config, _replaced(config, key.split("."), "", parse(value, where)))


def _replaced(section: Any, keys: list[str], prefix: str, value: Any) -> Any:
    field = _field(type(section), keys[0], prefix, value, "")
    name = prefix + keys[0]
    current = getattr(section, keys[0])
    if dataclasses.is_dataclass(current):
        if len(keys) > 1:
            new = _replaced(current, keys[1:], name + ".", value)
        else:
            tree = value if isinstance(value, dict) else _expanded(keys[0], value, name, "")
            new = current
            for key, item in tree.items():
                new = _replaced(new, [str(key)], name + ".", item)
    elif len(keys) > 1:
        if not isinstance(current, Mapping):
            raise ConfigError(
                f"{'.'.join([name, *keys[1:]])}: {name} is a value, not a section; write {name}={said(value)}"
            )
        new = _value(field, {**current, ".".join(keys[1:]): value}, name, "")
    else:
        new = _value(field, value, name, "")
    return dataclasses.replace(section, **{keys[0]: new})


def _section(kind: type[Any], tree: Any, prefix: str, where: str) -> Any:
    values = {}
    for key, value in tree.items():
        field = _field(kind, str(key), prefix, value, where)
        section = _types(kind)[field.name]
        if dataclasses.is_dataclass(section):
            tree_ = value if isinstance(value, dict) else _expanded(field.name, value, prefix + field.name, where)
            values[field.name] = _section(typing.cast("type[Any]", section), tree_, f"{prefix}{field.name}.", where)
        else:
            values[field.name] = _value(field, value, prefix + field.name, where)
    return kind(**values)


def _expanded(section: str, value: Any, name: str, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if section in SHORTHANDS and isinstance(value, str):
        return {SHORTHANDS[section]: value}
    raise ConfigError(f"{where}{name}: is {said(value)}, not a section of keys")


def _field(kind: type[Any], key: str, prefix: str, value: Any, where: str) -> dataclasses.Field[Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if key in fields:
        return fields[key]
    near = (
        difflib.get_close_matches(key, fields, n=1)
        or [path for path in _all_keys(Config) if path.rpartition(".")[2] == key][:1]
    )
    suggestion = ""
    if near:
        suggestion = f"; did you mean {near[0] if '.' in near[0] else prefix + near[0]}?"
    raise ConfigError(
        f"{where}{prefix}{key}: unknown key (value {said(value)}){suggestion} allowed: {', '.join(fields)}".replace(
            ") allowed", "); allowed"
        )
    )


def _all_keys(kind: type[Any], prefix: str = "") -> list[str]:
    keys = []
    for name, section in _types(kind).items():
        if dataclasses.is_dataclass(section):
            keys += _all_keys(typing.cast("type[Any]", section), f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _types(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(field: dataclasses.Field[Any], value: Any, name: str, where: str) -> Any:
    """`value` as the field's type and within its range."""
    kind = str(field.type)

    def refuse(allowed: str) -> typing.NoReturn:
        near = difflib.get_close_matches(str(value), [str(o) for o in one_of], n=1) if one_of else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}{name}: is {said(value)}; allowed: {allowed}{hint}")

    one_of, least, above, most = (field.metadata.get(k) for k in ("one_of", "least", "above", "most"))
    converted = _converted(kind, value)
    if one_of is not None and converted not in one_of:
        refuse(", ".join(map(str, one_of)))
    if converted is _WRONG:
        refuse(bounds(field))
    if isinstance(converted, int | float) and not isinstance(converted, bool):
        low = (least is not None and converted < least) or (above is not None and converted <= above)
        if low or (most is not None and converted > most):
            refuse(bounds(field))
    return converted


_WRONG = object()
_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[str]": "a list of texts",
    "list[float]": "a list of numbers",
    "Mapping[str, int]": "a mapping from names to whole numbers of at least 1",
    "Mapping[str, Any]": "a mapping from names to text, finite numbers, true, false, null, lists and mappings",
}


def bounds(field: dataclasses.Field[Any]) -> str:
    """The range of a numeric field, in words."""
    m = field.metadata
    words = [_KINDS[str(field.type)]]
    words += [f"at least {m['least']}"] if m["least"] is not None else []
    words += [f"above {m['above']}"] if m["above"] is not None else []
    words += [f"at most {m['most']}"] if m["most"] is not None else []
    return ", ".join(words)


def _converted(kind: str, value: Any) -> Any:
    """`value` as `kind`, or `_WRONG`. YAML reads 1e-3 as text and 500 as a number; both mean what the field says."""
    if kind == "bool":
        return value if isinstance(value, bool) else _WRONG
    if kind.startswith("list["):
        items = [_converted(kind[5:-1], item) for item in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if any(item is _WRONG for item in items) else items
    if kind.startswith("Mapping["):
        inner = kind.removeprefix("Mapping[str, ").removesuffix("]")
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return _WRONG
        found = {key: _converted(inner, item) for key, item in value.items()}
        wrong = any(item is _WRONG or (inner == "int" and item < 1) for item in found.values())
        return _WRONG if wrong else found
    if kind == "Any":
        return value if _is_plain(value) else _WRONG
    if kind == "str" and value is None:  # `data.val=` and `val:` leave the text empty
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return _WRONG
    if kind == "str":
        return str(value)
    try:
        number = float(value)
    except ValueError:
        return _WRONG
    if not math.isfinite(number):
        return _WRONG
    if kind == "float":
        return number
    return int(number) if number.is_integer() else _WRONG


def _is_plain(value: Any) -> bool:
    """Whether JSON holds `value` unchanged: no NaN, no date, no set, no key but text, nothing that contains itself."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries, in the order of the schema."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else _plain(value)
        for field in dataclasses.fields(config)
    }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def dump(config: Config) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return yaml.dump(to_dict(config), Dumper=StrictDumper, sort_keys=False, width=120)


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key that differs."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    return [f"{key}: {before[key]} -> {after[key]}" for key in after if before[key] != after[key]]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    sections = {field.name for field in dataclasses.fields(Config)}
    for key, value in tree.items():
        if not prefix and key in sections and isinstance(value, dict):
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat
