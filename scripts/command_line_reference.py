"""Markdown of the command-line reference, from the commands of typer: usage, examples, arguments, options, defaults."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from typer.main import get_command

from moondream_cv.cli import app

DETAILS = re.compile(r"\s*(?:\[dim\])?\\?\[((?:default: |env var: |required|[\d.]+<=x|x>=)[^\[\]]*)\](?:\[/\])?\s*$")
RANGE = re.compile(r"([\d.]+)<=x<=([\d.]+)|x>=([\d.]+)")
MARKUP = re.compile(r"\[/?(?:bold|dim)?\]")


class Parameter(NamedTuple):
    """An argument or an option: names with metavar, description, default; empty without a default."""

    names: str
    description: str
    default: str


def command_line_reference() -> str:
    """Return a section for each command, in the order of `--help`."""
    root = get_command(app)
    context = root.make_context("moondream-cv", ["demo"], resilient_parsing=True)
    sections: list[str] = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        sections += _sections(command, name, context, level=2)
    return "\n".join(sections)


def _sections(command: Any, name: str, parent: Any, level: int) -> list[str]:
    """Return the sections of a command and of its subcommands."""
    context = type(parent)(command, info_name=name, parent=parent)
    path = context.command_path
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    description, examples = _help_parts(command.help or "")

    lines = [f"{'#' * level} {path.removeprefix('moondream-cv ')}", "", description, "", "```text", usage, "```", ""]
    if examples:
        lines += ["```", *examples, "```", ""]
    shown = [parameter for parameter in command.params if not parameter.hidden]
    parameters = [(parameter.param_type_name, _parameter(parameter, context)) for parameter in shown]
    for kind, title in (("argument", "Argument"), ("option", "Option")):
        found = [parameter for type_name, parameter in parameters if type_name == kind]
        if found:
            lines += _table(title, found)
    for subname, subcommand in getattr(command, "commands", {}).items():
        lines += _sections(subcommand, subname, context, level + 1)
    return lines


def _help_parts(text: str) -> tuple[str, list[str]]:
    """Return the description of a help text in Markdown, and its example lines.

    Paragraphs that start with a backspace keep their lines: the examples, whose lines start with "$", and files.
    """
    description: list[str] = []
    examples: list[str] = []
    for paragraph in text.split("\n\n"):
        lines = [MARKUP.sub("", line).replace("\\[", "[") for line in paragraph.replace("\b\n", "\b").splitlines()]
        commands = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
        if commands:
            examples += commands
        elif paragraph.startswith("\b"):
            description.append("\n".join(["```text", lines[0].lstrip("\b"), *lines[1:], "```"]))
        else:
            description.append(_escaped("\n".join(lines)))
    return "\n\n".join(description), examples


def _parameter(parameter: Any, context: Any) -> Parameter:
    names, text = parameter.get_help_record(context)
    names = re.sub(r" <.*>$", "", names)
    default, notes = "", []
    while match := DETAILS.search(text):
        text = text[: match.start()]
        for detail in match[1].split("; "):
            if detail.startswith("default: "):
                default = detail.removeprefix("default: ")
            elif detail == "required":
                default = "required"
            elif detail.startswith("env var: "):
                notes.append(f"Environment variable: `{detail.removeprefix('env var: ')}`.")
            elif found := RANGE.fullmatch(detail):
                low, high = found[1] or found[3], found[2]
                notes.append(f"{low} to {high}." if high else f"At least {low}.")
    return Parameter(names, " ".join([_escaped(MARKUP.sub("", text).replace("\\[", "[")), *notes]), default)


def _table(title: str, parameters: list[Parameter]) -> list[str]:
    has_defaults = any(parameter.default for parameter in parameters)
    lines = [
        f"| {title} | Description |{' Default |' if has_defaults else ''}",
        f"|---|---|{'---|' if has_defaults else ''}",
    ]
    for names, description, default in parameters:
        spellings = ", ".join(f"`{name}`" for name in re.split(r",\s", names.replace("|", "¦")))
        lines.append(f"| {spellings} | {description} |" + (f" {_escaped(default)} |" if has_defaults else ""))
    return [line.replace("¦", "\\|") for line in lines] + [""]


def _escaped(text: str) -> str:
    """Escape the characters of Markdown that help texts use literally."""
    return re.sub(r"([|<*_])", r"\\\1", text)
