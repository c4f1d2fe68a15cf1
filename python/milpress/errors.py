"""What can go wrong: one root, and under it one class for each kind of cause."""

from __future__ import annotations


class CompressionError(Exception):
    """Root of every error that milpress raises on purpose."""


class ConfigError(CompressionError, ValueError):
    """A setting, recipe or argument that is wrong by itself."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting of a type that it can't have."""


class PackageError(CompressionError, ValueError):
    """A package that breaks its format, is of an unsupported kind, or climbs out of its folder."""


class ModelKindError(PackageError, TypeError):
    """A model that is no ML program, nor a pipeline with ML programs in it."""


class PackageNotFoundError(PackageError, FileNotFoundError):
    """A path at which there is nothing."""


class DestinationError(CompressionError, FileExistsError):
    """A destination that can't be written to: taken, no package, or the source itself."""


class StorageError(CompressionError, OSError):
    """The system refused to read or write: a full disk, missing permission, a broken device."""


class UnsupportedError(CompressionError, ValueError):
    """A weight or model that can't be compressed as asked."""


class VerificationError(CompressionError, ValueError):
    """A compressed package that does not keep what was promised."""
