"""Turns an entry point, `module:name`, into the object that it names, with an error that says what is wrong.

Configurations name environments and evaluators this way, so that `rollout` never imports `envs`.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from rollout.config import EnvConfig
from rollout.env import Env
from rollout.errors import ConfigError

__all__ = ["load_entry_point", "load_env"]


def load_entry_point(entry_point: str) -> Any:
    """The object that `module:name` names.

    Raises:
        ConfigError: There is no such module or name, or the module fails when it is imported.
    """
    module_name, _, name = entry_point.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"cannot import {module_name!r} of {entry_point!r}: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"module {module_name!r} has no {name!r}") from error


def load_env(config: EnvConfig) -> Env:
    """Makes the environment that a configuration names.

    Raises:
        ConfigError: It cannot be imported, or refuses its arguments.
        EnvError: It does not exist or cannot be made.
    """
    make = load_entry_point(config.entry_point)
    try:
        return cast("Env", make(**config.args))
    except TypeError as error:
        raise ConfigError(f"env.args of {config.entry_point}: {error}") from error
