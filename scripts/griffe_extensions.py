"""Griffe extensions for the Python reference: inherited constructor arguments, and types of results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from griffe import Class, DocstringSectionReturns, DocstringSectionYields, Extension, Function, Module, ParameterKind

DECORATOR = "moondream_cv._inherited_options.inherit_options"
RESULT_WITH_COLON = re.compile(r"^(Returns|Yields):\n(    .*\n?)*?    .*: ", re.MULTILINE)


class InheritedOptions(Extension):
    """Replaces `**options` of constructors with the decorator `inherit_options`, as the decorator does at run time."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Update the constructors of all decorated classes of a package."""
        for cls in _classes(pkg):
            if any(decorator.callable_path == DECORATOR for decorator in cls.decorators):
                _show_options(cls)


class TypedResults(Extension):
    """Takes the types of results from the annotations only.

    Without it, the text of a description up to its first colon is the type.
    """

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Update the docstrings of all functions of a package."""
        for function in _functions(pkg):
            if function.docstring is not None and RESULT_WITH_COLON.search(function.docstring.value):
                _restore_descriptions(function)


def _modules(module: Module) -> Iterator[Module]:
    yield module
    for submodule in module.modules.values():
        if not submodule.is_alias:
            yield from _modules(submodule)


def _classes(package: Module) -> Iterator[Class]:
    for module in _modules(package):
        yield from (cls for cls in module.classes.values() if not cls.is_alias)


def _functions(package: Module) -> Iterator[Function]:
    for scope in (*_modules(package), *_classes(package)):
        yield from (function for function in scope.functions.values() if not function.is_alias)


def _show_options(cls: Class) -> None:
    own, base = cls.members["__init__"], cls.resolved_bases[0].members["__init__"]
    assert isinstance(own, Function)
    assert isinstance(base, Function)
    options = next(p for p in own.parameters if p.kind is ParameterKind.var_keyword)
    del own.parameters[options.name]
    for parameter in base.parameters:
        if parameter.kind is ParameterKind.keyword_only and parameter.name not in own.parameters:
            own.parameters.add(parameter)
    assert own.docstring is not None
    own.docstring.value = getattr(import_module(cls.module.path), cls.name).__init__.__doc__


def _restore_descriptions(function: Function) -> None:
    assert function.docstring is not None
    for section in function.docstring.parsed:
        if isinstance(section, DocstringSectionReturns | DocstringSectionYields):
            (result,) = section.value
            annotation = function.returns
            if isinstance(section, DocstringSectionYields) and annotation is not None:
                annotation = getattr(annotation, "slice", annotation)  # Iterator[X]: X
            if str(result.annotation) != str(annotation):
                result.description = f"{result.annotation}: {result.description}"
                result.annotation = annotation
