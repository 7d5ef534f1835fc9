"""Markdown of the HTTP reference, from the OpenAPI document of the server: requests, replies, fields and errors.

The document is that of `moondream-cv serve` at /openapi.json. Descriptions of fields that it lacks are in the
docstrings of the server's pydantic models.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from moondream_cv.server.app import create_app

TAGS = {
    "operations": "Operations",
    "moondream": "Moondream",
    "tuning": "Fine-tuning",
    "openai": "OpenAI",
    "roboflow": "Roboflow Inference",
    "fal": "fal",
    "x-anylabeling": "X-AnyLabeling",
}
Schema = Mapping[str, Any]


def http_reference() -> str:
    """Return a section for each API with its paths, and a section with the types that they share."""
    document = create_app(_no_model).openapi()
    return _Reference(document).markdown()


def _no_model() -> Any:
    raise RuntimeError("the reference needs no model")


class _Reference:
    """The Markdown of an OpenAPI document.

    Each type is described once: at the first path that has it as its body or reply, otherwise in the last section.

    Args:
        document: OpenAPI document.
    """

    def __init__(self, document: Schema) -> None:
        self._document = document
        self._schemas: dict[str, Any] = document["components"]["schemas"]
        self._documented = _field_descriptions()
        self._described: set[str] = set()
        self._mentioned: set[str] = set()
        self._sent = self._reachable(
            media["schema"]
            for methods in document["paths"].values()
            for operation in methods.values()
            for media in operation.get("requestBody", {}).get("content", {}).values()
        )

    def _reachable(self, schemas: Iterable[Schema]) -> set[str]:
        """Return the names of the types that schemas refer to, directly or through other types."""
        found: set[str] = set()
        texts = [json.dumps(schema) for schema in schemas]
        while texts:
            new = set(re.findall(r'"#/components/schemas/(\w+)"', texts.pop())) - found
            found |= new
            texts += [json.dumps(self._schemas[name]) for name in new]
        return found

    def markdown(self) -> str:
        """Return all sections."""
        by_tag: dict[str, list[str]] = {}
        for path, methods in self._document["paths"].items():
            for method, operation in methods.items():
                by_tag.setdefault(operation["tags"][0], []).extend(self._operation(method.upper(), path, operation))
        lines: list[str] = []
        for tag, sections in by_tag.items():
            lines += [f"## {TAGS[tag]}", "", *sections]
        lines += ["## Types", ""]
        while remaining := sorted(self._mentioned - self._described):
            for name in remaining:
                lines += [f"### {name}", "", *self._type(name)]
        return "\n".join(lines)

    def _operation(self, method: str, path: str, operation: Schema) -> list[str]:
        """Return the section of a path."""
        anchor = re.sub(r"[^a-z0-9]+", "-", f"{method} {path}".lower()).strip("-")
        lines = [f"### `{method} {path}` {{ #{anchor} }}", ""]
        lines += [f"**{operation['summary']}.** {_prose(operation.get('description', ''))}", ""]
        if operation.get("parameters"):
            lines += ["| Parameter | In | Type | Description |", "|---|---|---|---|"]
            lines += [self._parameter(parameter) for parameter in operation["parameters"]]
            lines.append("")
        body = operation.get("requestBody")
        if body:
            lines += ["**Body**", "", *self._content(body["content"])]
        errors = {}
        for status, response in operation["responses"].items():
            if status[0] in "123":
                description = _prose(response["description"]).replace("Successful Response", "")
                lines += [f"**Reply {status}**", "", description, "", *self._content(response.get("content", {}))]
            else:
                errors[status] = response
        return lines + self._errors(errors)

    def _parameter(self, parameter: Schema) -> str:
        schema = parameter["schema"]
        name = f"`{parameter['name']}`" + (" (required)" if parameter.get("required") else "")
        description = _cell(parameter.get("description") or schema.get("description", "")) + _default(schema)
        return f"| {name} | {parameter['in']} | {self._type_name(schema)} | {description} |"

    def _content(self, content: Schema) -> list[str]:
        """Return the media types of a body or a reply, and the fields of its type."""
        lines: list[str] = []
        for kind, media in content.items():
            schema = media.get("schema", {})
            name = schema.get("$ref", "").rpartition("/")[2]
            if name and name not in self._described:
                lines += [f"`{kind}`: {name}", "", *self._type(name)]
            else:
                lines += [f"`{kind}`: {self._type_name(schema)}", ""]
        return lines

    def _type(self, name: str) -> list[str]:
        """Return the description and the fields of a type, and mark it as described."""
        self._described.add(name)
        schema = self._schemas[name]
        summary = _prose(inspect.cleandoc(schema.get("description", "")).partition("\n\nAttributes:")[0])
        lines = [f'<span id="{name.lower()}"></span>{summary}', ""]
        fields = schema.get("properties", {})
        if not fields:
            return lines
        required = schema.get("required", ()) if name in self._sent else ()
        rows = []
        for field, value in fields.items():
            text = value.get("description") or self._documented.get(name, {}).get(field, "")
            mark = " (required)" if field in required else ""
            rows.append([f"`{field}`{mark}", self._type_name(value), f"{_cell(text)}{_default(value)}".strip()])
        columns = 3 if any(row[2] for row in rows) else 2
        titles = ["Field", "Type", "Description"][:columns]
        lines += [f"| {' | '.join(titles)} |", "|---" * columns + "|"]
        lines += [f"| {' | '.join(row[:columns])} |" for row in rows]
        return [*lines, ""]

    def _type_name(self, schema: Schema) -> str:
        """Return a type in words, with links to the types of the document."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            self._mentioned.add(name)
            return f"[{name}](#{name.lower()})"
        if "const" in schema:
            return f"`{json.dumps(schema['const'])}`"
        if "enum" in schema:
            return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
        choices = schema.get("anyOf") or schema.get("oneOf")
        if choices:
            names = dict.fromkeys(self._type_name(choice) for choice in choices)
            return " or ".join(names)
        if schema.get("type") == "array":
            return f"array{_limits(schema)} of {self._type_name(schema.get('items', {}))}"
        if isinstance(schema.get("additionalProperties"), dict):
            return f"object with values of {self._type_name(schema['additionalProperties'])}"
        return f"{schema.get('type', 'any')}{_limits(schema)}"

    def _errors(self, errors: Schema) -> list[str]:
        if not errors:
            return []
        statuses = ", ".join(errors)
        lines = ['<details markdown="1">', f"<summary>Errors: {statuses}</summary>", ""]
        lines += ["| Status | Reason | Type |", "|---|---|---|"]
        for status, response in errors.items():
            kinds = [self._type_name(media.get("schema", {})) for media in response.get("content", {}).values()]
            lines.append(f"| {status} | {_cell(response['description'])} | {', '.join(kinds)} |")
        return [*lines, "", "</details>", ""]


def _limits(schema: Schema) -> str:
    """Return the limits of a number or of a length in words, in parentheses."""
    low = schema.get("minimum", schema.get("minItems"))
    high = schema.get("maximum", schema.get("maxItems"))
    if low is None and high is None:
        return ""
    if low == high:
        return f" ({low})"
    if low is None:
        return f" (at most {high})"
    return f" (at least {low})" if high is None else f" ({low} to {high})"


def _default(schema: Schema) -> str:
    default = schema.get("default")
    return "" if default is None else f" Default: `{json.dumps(default)}`."


def _field_descriptions() -> dict[str, dict[str, str]]:
    """Return the descriptions of fields in the docstrings of the server's models, by model and field."""
    found: dict[str, dict[str, str]] = {}
    for model in _subclasses(BaseModel):
        if model.__module__.startswith("moondream_cv."):
            fields: dict[str, str] = {}
            for base in reversed(model.__mro__):
                fields |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
            found[model.__name__] = fields
    return found


def _subclasses(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _attributes(docstring: str) -> dict[str, str]:
    """Return the entries of the section "Attributes" of a docstring."""
    section = docstring.partition("\nAttributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    pairs = (entry.partition(": ") for entry in entries)
    return {name: " ".join(text.split()) for name, _, text in pairs}


def _prose(text: str) -> str:
    """Return a description as Markdown: angle brackets outside code are literal."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _cell(text: str) -> str:
    return _prose(" ".join(text.split())).replace("|", "\\|")
