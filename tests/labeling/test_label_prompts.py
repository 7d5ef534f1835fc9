"""Classes and prompts: `prompts.yaml`, class names, and the messages for invalid content."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.prompts import ClassPrompts, class_prompts, load_prompts

VALID = """
dog:
cup: [cup, mug]
pole: lamp post
"no": stop sign
person:
  prompts: [person, cyclist]
  negative: mannequin
  threshold: 0.4
  skill: point
  max_objects: 20
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_yields_classes_in_order_with_defaults(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, VALID), confidence=0.25) == (
        ClassPrompts(name="dog", prompts=("dog",), threshold=0.25),
        ClassPrompts(name="cup", prompts=("cup", "mug"), threshold=0.25),
        ClassPrompts(name="pole", prompts=("lamp post",), threshold=0.25),
        ClassPrompts(name="no", prompts=("stop sign",), threshold=0.25),
        ClassPrompts(
            name="person",
            prompts=("person", "cyclist"),
            negative=("mannequin",),
            threshold=0.4,
            skill="point",
            max_objects=20,
        ),
    )


def test_class_names_select_classes_of_the_file_and_add_others(tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    assert load_prompts(path, ["cat", "cup"], 0.1) == (
        ClassPrompts(name="cat", threshold=0.1),
        ClassPrompts(name="cup", prompts=("cup", "mug"), threshold=0.1),
    )
    assert class_prompts(["cat"])[0].prompts == ("cat",)


def test_classes_can_be_pickled_and_written_as_json(tmp_path: Path) -> None:
    person = load_prompts(write(tmp_path, VALID))[-1]
    assert pickle.loads(pickle.dumps(person)) == person
    assert person.to_dict() == {
        "name": "person",
        "prompts": ["person", "cyclist"],
        "negative": ["mannequin"],
        "threshold": 0.4,
        "skill": "point",
        "max_objects": 20,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- dog\n- cup", "must contain class names with their prompts"),
        ("dog: [", "is not valid YAML"),
        ("dog: {prompts: [a], promtps: [b]}", 'class "dog": unknown key "promtps"; did you mean "prompts"?'),
        ("dog: {color: red}", 'unknown key "color"; known keys are prompts, negative, threshold, skill, max_objects'),
        ("dog: a\ncat: b\ndog: c", 'the class "dog" occurs in lines 1 and 3'),
        ("dog: {prompts: a, prompts: b}", 'the key "prompts" occurs in lines 1 and 1'),
        ("dog: a\nDog: b", 'must differ in more than case; duplicates: "dog", "Dog"'),
        ("no: stop sign", 'line 1: the class must be text, but no is a boolean in YAML; quote it: "no"'),
        ("1: one", 'line 1: the class must be text, but 1 is a number in YAML; quote it: "1"'),
        ("lamp: [lamp, on]", 'class "lamp" must be text, but on is a boolean in YAML; quote it: "on"'),
        ("lamp: 2024-01-01", "2024-01-01 is a date in YAML"),
        ("lamp: [a, null]", "null is null in YAML"),
        ("lamp: {negative: [[a]]}", 'class "lamp", key "negative" must be text, got a list or a mapping'),
        ("dog: [dog, Dog]", 'class "dog", key "prompts" must be unique; duplicates: "dog", "Dog"'),
        ("dog: {prompts: [wolf], negative: [Wolf]}", 'class "dog": the prompt "wolf" is also a negative prompt'),
        ("dog: {negative: dog}", 'class "dog": the prompt "dog" is also a negative prompt'),
        ("dog: {threshold: 1.5}", 'class "dog", key "threshold" must be between 0 and 1, got 1.5'),
        ("dog: {threshold: yes}", 'class "dog", key "threshold" must be between 0 and 1, got True'),
        ("dog: {threshold: .nan}", 'class "dog", key "threshold" must be between 0 and 1, got nan'),
        ("dog: {threshold: !!int a}", 'class "dog", key "threshold" has an invalid value: a'),
        ("dog: {threshold: [0.5]}", 'key "threshold" must be a single value'),
        ("dog: {max_objects: 0}", 'class "dog", key "max_objects" must be an integer of at least 1, got 0'),
        ("dog: {skill: segment}", "class \"dog\", key \"skill\" must be 'detect' or 'point', got 'segment'"),
        ('" dog": a', 'class " dog" must not begin or end with blanks'),
        ('"d\\tog": a', r'class "d\tog" must not contain control characters'),
        ('dog: "a\\nb"', r'key "prompts" must not contain control characters, got "a\nb"'),
        ('dog: ["a", ""]', 'key "prompts" must not be empty'),
        ("dog: " + 2000 * "[", "is nested too deeply"),
        ("dog: &a [*a]", 'class "dog" must be text, got a list or a mapping'),
    ],
)
def test_invalid_files_are_rejected_with_class_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(LabelingError) as raised:
        load_prompts(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(LabelingError, match=r"missing\.yaml cannot be read: No such file"):
        load_prompts(tmp_path / "missing.yaml")
    path = tmp_path / "prompts.yaml"
    path.write_bytes("Größe: a".encode("latin-1"))
    with pytest.raises(LabelingError, match="is not text in UTF-8"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there are no classes"),
        (["dog", "Dog"], 'duplicates: "dog", "Dog"'),
        (["dog", ""], 'class "" must not be empty'),
        (["dog "], 'class "dog " must not begin or end with blanks'),
        (["d\x1bog"], r'class "d\x1bog" must not contain control characters'),
    ],
)
def test_invalid_class_names_are_rejected(names: list[str], message: str) -> None:
    with pytest.raises(LabelingError) as raised:
        class_prompts(names)
    assert message in str(raised.value)


def test_class_names_with_another_case_than_in_the_file_are_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, "Dog: [dog, puppy]")
    with pytest.raises(LabelingError, match=r'class "dog" is "Dog" in .*; use the same spelling'):
        load_prompts(path, ["dog"])
