"""Constructor arguments that subclasses share with their base class, documented once."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type[Any])


def inherit_options(cls: Class) -> Class:
    """Show the keyword arguments of the base class in the signature and docstring of a constructor.

    A class decorator for constructors that pass `**options` on to their base class. `help()` and `inspect.signature`
    then list every argument.
    """
    init, base = vars(cls)["__init__"], vars(cls.__mro__[1])["__init__"]
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {parameter.name for parameter in own}
    shared = [
        parameter
        for parameter in inspect.signature(base).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in names
    ]
    init.__signature__ = inspect.Signature([*own, *shared], return_annotation=None)
    if init.__doc__ and base.__doc__:  # None with python -OO
        init.__doc__ = _add_arguments(inspect.cleandoc(init.__doc__), inspect.cleandoc(base.__doc__), shared)
    return cls


def _add_arguments(text: str, base_text: str, shared: list[inspect.Parameter]) -> str:
    """Append the descriptions of shared arguments to the `Args` section of a docstring."""
    names = {parameter.name for parameter in shared}
    entries: list[list[str]] = []
    for line in _arguments(base_text).splitlines()[1:]:
        if line.startswith("     "):  # a continuation of the entry
            entries[-1].append(line)
        else:
            entries.append([line])
    added = [line for entry in entries if entry[0].strip().partition(":")[0] in names for line in entry]
    arguments = _arguments(text)
    return text.replace(arguments, "\n".join([arguments, *added]))


def _arguments(text: str) -> str:
    return next(part for part in text.split("\n\n") if part.startswith("Args:"))
