"""Deprecated names: each works for one more version, with a `FutureWarning` that gives the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

REMOVED_IN = "0.2"
"""Version that removes the deprecated names."""

T = TypeVar("T", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Emit a `FutureWarning` for a deprecated name.

    Args:
        old: Deprecated name, as users write it.
        new: Name to use instead.
        stacklevel: Frame that the warning names: 1 is the caller of this function, 2 the caller of that function.
    """
    message = f"{old} is deprecated and will be removed in moondream-cv {REMOVED_IN}; use {new}"
    warnings.warn(message, FutureWarning, stacklevel=stacklevel + 1)


def renamed_arguments(**current_names: str) -> Callable[[T], T]:
    """Return a decorator that accepts deprecated keyword arguments of a function or class.

    Decorate a dataclass above `@dataclass`. The signature that `help()` shows has the new names only.

    Args:
        **current_names: New name for each deprecated argument.

    Example:
        >>> @renamed_arguments(colour_by="color_by")
        ... def annotate(image, color_by="class"): ...
    """

    def decorate(target: T) -> T:
        function: Callable[..., Any] = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        names = {field.name for field in fields(target) if field.init} if is_dataclass(target) else set()

        @functools.wraps(function)
        def with_current_names(*args: Any, **kwargs: Any) -> Any:
            is_replace = bool(names) and names <= kwargs.keys()  # `dataclasses.replace` passes every current value
            for old in current_names.keys() & kwargs.keys():
                new = current_names[old]
                if new in kwargs and not is_replace:
                    raise TypeError(f"{old} and {new} are the same argument; pass {new} only")
                warn_renamed(f"{target.__name__}: the argument {old}", new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        if isinstance(target, type):
            target.__init__ = with_current_names  # type: ignore[misc]
            return target
        return with_current_names  # type: ignore[return-value]

    return decorate


def renamed_attribute(old: str, new: str) -> Any:
    """Return a property for a deprecated attribute, which reads and writes the current one.

    Assign it in the class body without an annotation, so that it does not become a field of a dataclass.

    Args:
        old: Deprecated name with its class, such as "TrackedFrame.looked".
        new: Current name of the attribute, without its class.

    Example:
        >>> class TrackedFrame:
        ...     looked = renamed_attribute("TrackedFrame.looked", "is_keyframe")
    """
    owner = old.rpartition(".")[0]

    def get_current(instance: Any) -> Any:
        warn_renamed(old, f"{owner}.{new}")
        return getattr(instance, new)

    def set_current(instance: Any, value: Any) -> None:
        warn_renamed(old, f"{owner}.{new}")
        setattr(instance, new, value)

    return property(get_current, set_current, doc=f"Deprecated: use `{new}`.")


def renamed_function(old: str, new: str, function: T) -> T:
    """Return a deprecated function or method that calls the current one.

    Args:
        old: Deprecated name, such as "Detector.attempt".
        new: Current name, such as "Detector.detect_each".
        function: Current function.

    Example:
        >>> class Detector:
        ...     def detect_each(self, frames): ...
        ...
        ...     attempt = renamed_function("Detector.attempt", "Detector.detect_each", detect_each)
    """

    @functools.wraps(function)
    def call_current(*args: Any, **kwargs: Any) -> Any:
        warn_renamed(old, new)
        return function(*args, **kwargs)

    call_current.__doc__ = f"Call `{new}`. Deprecated."
    return call_current  # type: ignore[return-value]
