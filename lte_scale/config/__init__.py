"""Configuration: the schema, what must hold between keys, and strict loading."""

from lte_scale.config.checks import check_topology, check_training
from lte_scale.config.load import differences, dump, load_config, overridden, to_dict
from lte_scale.config.schema import Config, ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "check_topology",
    "check_training",
    "differences",
    "dump",
    "load_config",
    "overridden",
    "to_dict",
]
