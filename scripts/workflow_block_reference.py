"""Markdown of the reference of the workflow blocks: description, fields and outputs of each block.

The workflows engine is not installed in the environment that builds the site, so the source code of the blocks is
parsed instead of imported.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCKS = Path(__file__).parents[1] / "blocks" / "moondream_cv_blocks"
IMAGES = "Images to process: the workflow input `$inputs.image`, or images of other steps."


class Field(NamedTuple):
    """A field of a block: name, description, default as JSON-like text, and whether it is required."""

    name: str
    description: str
    default: str
    required: bool


class Block(NamedTuple):
    """A block: type such as "moondream_cv/detect@v1", description in Markdown, fields, names of outputs."""

    type: str
    description: str
    fields: list[Field]
    outputs: list[str]


def workflow_block_reference() -> str:
    """Return a section for each block, in the order of `load_blocks`."""
    lines: list[str] = []
    for block in blocks():
        description = re.sub(r"^#### (.*)$", r"**\1**", block.description, flags=re.MULTILINE)
        lines += [
            f"## {block.type}",
            "",
            description,
            "",
            "**Fields**",
            "",
            "| Field | Description | Default |",
            "|---|---|---|",
        ]
        lines += [f"| `{name}` | {text} | {default} |" for name, text, default, _ in block.fields]
        lines += ["", "**All outputs**", "", ", ".join(f"`{name}`" for name in block.outputs), ""]
    return "\n".join(lines)


def blocks() -> list[Block]:
    """Return all blocks of the plugin."""
    shared = _classes(_module("fields"))
    return [_block(_module(name), shared) for name in _block_modules()]


def _module(name: str) -> ast.Module:
    return ast.parse((BLOCKS / f"{name}.py").read_text(encoding="utf-8"))


def _block_modules() -> list[str]:
    """Return the modules of the blocks, in the order of the list that `load_blocks` returns."""
    load = next(node for node in _module("__init__").body if getattr(node, "name", "") == "load_blocks")
    modules = {
        alias.name: node.module
        for node in ast.walk(load)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    returned = next(node.value for node in ast.walk(load) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.List)
    return [modules[element.id] for element in returned.elts if isinstance(element, ast.Name)]


def _block(module: ast.Module, shared: dict[str, ast.ClassDef]) -> Block:
    constants = _constants(module)
    classes = {**shared, **_classes(module)}
    kind = ""
    fields: dict[str, Field] = {}
    for cls in _with_bases(classes["Manifest"], classes):
        for node in cls.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if node.target.id == "type" and isinstance(node.annotation, ast.Subscript):
                kind = ast.literal_eval(node.annotation.slice)
            else:
                fields[node.target.id] = _field(node, constants)
    required = [field for field in fields.values() if field.required]
    optional = [field for field in fields.values() if not field.required]
    return Block(kind, constants["DESCRIPTION"].strip(), required + optional, list(_outputs(module, constants)))


def _classes(module: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def _with_bases(cls: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Yield the bases of a class, and the class."""
    for base in cls.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _with_bases(classes[base.id], classes)
    yield cls


def _constants(module: ast.Module) -> dict[str, Any]:
    """Return the constants of a module, and those that it imports from the package."""
    found: dict[str, Any] = {}
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("moondream_cv."):
            path = BLOCKS.parents[1] / f"{(node.module or '').replace('.', '/')}.py"
            if path.exists() and any(alias.name.isupper() for alias in node.names):
                found |= _constants(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def _field(node: ast.AnnAssign, constants: dict[str, Any]) -> Field:
    assert isinstance(node.target, ast.Name)
    name, call = node.target.id, node.value
    if not isinstance(call, ast.Call):  # the images
        return Field(name, IMAGES, "required", True)
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    description = ast.literal_eval(options["description"]).replace("|", "\\|")
    if "default_factory" in options:
        return Field(name, description, "empty", False)
    if "default" not in options:
        return Field(name, description, "required", True)
    default = options["default"]
    value = constants[default.id] if isinstance(default, ast.Name) else ast.literal_eval(default)
    text = value if isinstance(value, str) else json.dumps(value)
    return Field(name, description, "not set" if value is None else f"`{text}`", False)


def _outputs(module: ast.Module, constants: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the outputs of a block: its results, and the errors that all blocks have."""
    manifest = _classes(module)["Manifest"]
    for node in ast.walk(manifest):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "OutputDefinition":
            name = next(keyword.value for keyword in node.keywords if keyword.arg == "name")
            if isinstance(name, ast.Constant):
                yield name.value
            else:  # a comprehension over the names of detections
                yield from constants["DETECTIONS"]
    yield from ("error_status", "error_message")
