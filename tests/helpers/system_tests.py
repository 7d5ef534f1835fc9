"""Find the tests that start a server, a browser or another process, for the marker `system`.

A test counts if it uses one of MODULES itself, in a fixture, or in a helper of the tests that either of them calls. So
the marker follows from the code, and nobody has to set it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

TESTS = str(Path(__file__).parents[1])
MODULES = (
    "moondream_cv.server.image_decoding",
    "moondream_cv.server.runtime.engine_process",
    "moondream_cv.server.service",
    "multiprocessing",
    "playwright",
    "subprocess",
    "tests.helpers.hub",
    "tests.helpers.served",
    "uvicorn",
)


def is_system_test(item: pytest.Item, known: dict[object, bool]) -> bool:
    """Return whether a test starts a server, a browser or another process.

    Args:
        item: The collected test.
        known: Answers for functions and classes that have been examined; updated.
    """
    functions = [getattr(item, "function", None)]
    functions += [fixtures[-1].func for fixtures in item._fixtureinfo.name2fixturedefs.values()]
    return any(uses_processes(function, known) for function in functions)


def uses_processes(value: Any, known: dict[object, bool]) -> bool:
    """Return whether a module is one of MODULES, or a function or class of the tests reaches one of them.

    Args:
        value: Module, function, class or any other object.
        known: Answers for functions and classes that have been examined; updated.
    """
    if isinstance(value, ModuleType):
        return _is_listed(value.__name__)
    value = inspect.unwrap(value) if callable(value) else value
    value = getattr(getattr(value, "hypothesis", None), "inner_test", value)
    if _is_listed(getattr(value, "__module__", None) or ""):
        return True
    if not isinstance(value, (FunctionType, type)):
        return False
    if value not in known:
        known[value] = False  # for functions that call themselves
        members = [value] if isinstance(value, FunctionType) else vars(value).values()
        known[value] = any(
            _is_listed(name) or uses_processes(member.__globals__.get(name), known)
            for member in members
            if isinstance(member, FunctionType) and member.__code__.co_filename.startswith(TESTS)
            for name in _names(member.__code__)
        )
    return known[value]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_listed(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in MODULES)
