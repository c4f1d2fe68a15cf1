"""YAML files, with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import yaml

from milpress.errors import ConfigError, ConfigTypeError


def load(source: str | os.PathLike[str] | IO[Any], what: str) -> Any:
    """Return what a YAML file, given by path or opened, holds; ``what`` names it in an error."""
    place = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "stream")
    try:
        if isinstance(source, (str, os.PathLike)):
            return yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        if hasattr(source, "read"):
            return yaml.safe_load(source)
    except FileNotFoundError as error:
        msg = f"{place}: {what} must be there, got nothing"
        raise ConfigError(msg) from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        msg = f"{place}: {what} must be a YAML file, got {error}"
        raise ConfigError(msg) from error
    msg = f"{what} must be a path or an open file, got {type(source)}"
    raise ConfigTypeError(msg)
