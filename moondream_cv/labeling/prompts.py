"""Classes with their prompts, from class names and from `prompts.yaml`.

dog:                       # the class name is the prompt
cup: [cup, mug]            # synonyms
person:
  prompts: [person, cyclist]
  negative: [mannequin]
  threshold: 0.4
  skill: point
  max_objects: 20
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from moondream_cv.arguments import check_probability
from moondream_cv.escaping import escaped
from moondream_cv.labeling.errors import LabelingError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from yaml import Node

_KEYS = ("prompts", "negative", "threshold", "skill", "max_objects")
_TEXT_KEYS = ("prompts", "negative")
_YAML_TYPES = {"bool": "a boolean", "float": "a number", "int": "a number", "null": "null", "timestamp": "a date"}


class ClassPrompts(BaseModel):
    """A class with its prompts. It can be pickled, for worker processes.

    Attributes:
        name: Class name.
        prompts: Prompts that find objects of the class; empty: the class name.
        negative: Prompts of other objects. An object that a negative prompt describes better is removed.
        threshold: Minimum confidence, 0..1.
        skill: "detect" finds boxes, "point" finds points.
        max_objects: Maximum number of objects per image and prompt; None: the limit of the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    prompts: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    threshold: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    skill: Literal["detect", "point"] = "detect"
    max_objects: int | None = Field(default=None, ge=1)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _checked_text(name)

    @field_validator("prompts", "negative")
    @classmethod
    def _check_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for text in prompts:
            _checked_text(text)
        if (repeated := _repeated(prompts)) is not None:
            raise ValueError(f"must be unique; duplicates: {_quoted(repeated)}")
        return prompts

    @model_validator(mode="before")
    @classmethod
    def _use_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" in values and values.get("prompts", ()) == ():
            return {**values, "prompts": (values["name"],)}
        return values

    @model_validator(mode="after")
    def _check_negative(self) -> Self:
        both = {text.casefold() for text in self.prompts} & {text.casefold() for text in self.negative}
        if both:
            raise ValueError(f"the prompt {_quoted([min(both)])} is also a negative prompt; remove one of them")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the class as in `labeling.json`."""
        return self.model_dump(mode="json")


def class_prompts(names: Sequence[str], confidence: float = 0.0) -> tuple[ClassPrompts, ...]:
    """Return classes whose name is their prompt.

    Args:
        names: Class names.
        confidence: Minimum confidence, 0..1.

    Raises:
        LabelingError: There are no class names, or they are invalid or not unique.
        ValueError: The confidence is not between 0 and 1.
    """
    check_probability("confidence", confidence)
    if not names:
        raise LabelingError("there are no classes; name at least one class to label")
    for name in names:
        try:
            _checked_text(name)
        except ValueError as error:
            raise LabelingError(f"class {_quoted([name])} {error}") from error
    _check_different(names, "")
    return tuple(ClassPrompts(name=name, threshold=confidence) for name in names)


def load_prompts(
    path: str | os.PathLike[str], names: Sequence[str] | None = None, confidence: float = 0.0
) -> tuple[ClassPrompts, ...]:
    """Read the classes of `prompts.yaml`.

    Args:
        path: Path of the file.
        names: Class names to return, in this order. The name of a class that the file does not contain is its prompt.
            None: all classes of the file, in its order.
        confidence: Minimum confidence of classes without a threshold, 0..1.

    Raises:
        LabelingError: The file cannot be read, or its content is invalid; the message names the class and the key. Or
            `names` are invalid or not unique.
        ValueError: The confidence is not between 0 and 1.
    """
    check_probability("confidence", confidence)
    file = Path(path).expanduser()
    loaded = {}
    for name, entry in _read(file).items():
        try:
            loaded[name] = ClassPrompts(**{"threshold": confidence, **entry, "name": name})
        except ValidationError as error:
            raise LabelingError(f"{file}: class {_quoted([name])}{_message(error.errors()[0])}") from error
    _check_different(list(loaded), f"{file}: ")
    if names is None:
        return tuple(loaded.values())
    default = {one.name: one for one in class_prompts(names, confidence)}
    for name in names:
        other = next((key for key in loaded if key != name and key.casefold() == name.casefold()), None)
        if other is not None:
            raise LabelingError(f"class {_quoted([name])} is {_quoted([other])} in {file}; use the same spelling")
    return tuple(loaded.get(name, default[name]) for name in names)


def _check_different(names: Sequence[str], place: str) -> None:
    if (repeated := _repeated(names)) is not None:
        raise LabelingError(f"{place}class names must differ in more than case; duplicates: {_quoted(repeated)}")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a file by class name."""
    import yaml

    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise LabelingError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabelingError(f"{file} is not text in UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise LabelingError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise LabelingError(f"{file} is nested too deeply; write class names with their prompts") from error
    if root is None:
        raise LabelingError(f"{file} is empty; write class names with their prompts, such as cup: [cup, mug]")
    if not isinstance(root, yaml.MappingNode):
        raise LabelingError(f"{file} must contain class names with their prompts, such as cup: [cup, mug]")
    return {name: _entry(file, name, node) for name, node in _pairs(file, root, "class")}


def _entry(file: Path, name: str, node: Node) -> dict[str, Any]:
    """Return the keys and values of a class."""
    import yaml

    place = f"{file}: class {_quoted([name])}"
    if not isinstance(node, yaml.MappingNode):
        return {"prompts": _texts(place, node)}
    entry: dict[str, Any] = {}
    for key, value in _pairs(file, node, "key"):
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {_quoted(close)}?" if close else f"known keys are {', '.join(_KEYS)}"
            raise LabelingError(f"{place}: unknown key {_quoted([key])}; {hint}")
        if key in _TEXT_KEYS:
            entry[key] = _texts(f"{place}, key {_quoted([key])}", value)
        elif isinstance(value, yaml.ScalarNode):
            try:
                entry[key] = yaml.SafeLoader("").construct_object(value)
            except (yaml.YAMLError, ValueError) as error:
                raise LabelingError(f"{place}, key {_quoted([key])} has an invalid value: {value.value}") from error
        else:
            raise LabelingError(f"{place}, key {_quoted([key])} must be a single value, got a list or a mapping")
    return entry


def _pairs(file: Path, mapping: Any, kind: str) -> Iterable[tuple[str, Node]]:
    """Yield the keys and value nodes of a mapping node; keys must be unique text."""
    found: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        name = _text(f"{file}, line {line}: the {kind}", key)
        if name in found:
            raise LabelingError(f"{file}: the {kind} {_quoted([name])} occurs in lines {found[name]} and {line}")
        found[name] = line
        yield name, value


def _texts(place: str, node: Node) -> tuple[str, ...]:
    """Return the texts of a node: a text, a list of texts, or null."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return tuple(_text(place, item) for item in node.value)
    if isinstance(node, yaml.ScalarNode) and _yaml_type(node) == "null":
        return ()
    return (_text(place, node),)


def _text(place: str, node: Node) -> str:
    """Return the text of a node."""
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise LabelingError(f"{place} must be text, got a list or a mapping")
    kind, value = _yaml_type(node), node.value or "null"
    if kind != "str":
        meaning = _YAML_TYPES.get(kind, "no text")
        raise LabelingError(f'{place} must be text, but {value} is {meaning} in YAML; quote it: "{value}"')
    return str(node.value)


def _yaml_type(node: Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _message(problem: ErrorDetails) -> str:
    """Return the end of the message for a pydantic error: the key, the problem and the value."""
    place, kind, context = problem["loc"], problem["type"], problem.get("ctx", {})
    key = f", key {_quoted([str(place[0])])}" if place and place[0] != "name" else ""
    value = repr(problem["input"])[:100]
    if kind == "value_error":
        return f"{key}{'' if key or place else ':'} {context['error']}"
    if place[0] == "threshold":
        return f"{key} must be between 0 and 1, got {value}"
    if place[0] == "max_objects":
        return f"{key} must be an integer of at least 1, got {value}"
    if kind == "literal_error":
        return f"{key} must be {context['expected']}, got {value}"
    return f"{key}: {problem['msg']}, got {value}"


def _checked_text(text: str) -> str:
    """Return a class name or a prompt without control characters and surrounding blanks.

    Raises:
        ValueError: The text is empty, or has such characters.
    """
    if not isinstance(text, str):
        raise ValueError(f"must be a string, got {type(text).__name__}")
    if not text.strip():
        raise ValueError("must not be empty")
    if text != text.strip():
        raise ValueError(f"must not begin or end with blanks, got {_quoted([text])}")
    if escaped(text) != text:
        raise ValueError(f"must not contain control characters, got {_quoted([text])}")
    return text


def _repeated(names: Sequence[str]) -> list[str] | None:
    """Return the first names that are equal except for case; None if there are none."""
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(name.casefold(), []).append(name)
    return next((group for group in by_key.values() if len(group) > 1), None)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{escaped(str(name))}"' for name in names)
