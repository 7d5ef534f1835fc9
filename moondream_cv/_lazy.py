"""Lazy imports: a package imports each of its public names on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from moondream_cv._deprecation import warn_renamed


def lazy_names(
    package: str, submodules: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions `__getattr__` and `__dir__` of a package that imports its names on first use.

    List the same names under `TYPE_CHECKING`, so that type checkers and editors can resolve them.

    Args:
        package: Name of the package, `__name__`.
        submodules: Submodule that defines each name, relative to the package.
        renamed: Current name for each deprecated name. A deprecated name works, with a `FutureWarning`.

    Example:
        >>> __getattr__, __dir__ = lazy_names(__name__, {"Detector": "detector"})  # doctest: +SKIP
    """
    deprecated = dict(renamed or {})

    def get_name(name: str) -> Any:
        current = deprecated.get(name, name)
        if current not in submodules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in deprecated:
            warn_renamed(f"{package}.{name}", f"{package}.{current}")
        value = getattr(import_module(f".{submodules[current]}", package), current)
        setattr(sys.modules[package], current, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *submodules})

    return get_name, list_names
