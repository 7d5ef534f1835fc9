"""The reference of the workflow blocks, which parses the source code, has the fields and outputs of the engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moondream_cv_blocks import load_blocks
from tests.helpers.roboflow_app import skip_without_server

skip_without_server()
pytestmark = pytest.mark.roboflow

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_reference_has_the_fields_and_outputs_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    from workflow_block_reference import blocks

    described = {block.type: block for block in blocks()}
    manifests = [block.get_manifest() for block in load_blocks()]
    assert [manifest.model_fields["type"].annotation.__args__[0] for manifest in manifests] == [*described]
    for manifest, block in zip(manifests, described.values(), strict=True):
        fields = {name: field for name, field in manifest.model_fields.items() if name not in ("type", "name")}
        assert {field.name: field.required for field in block.fields} == {
            name: field.is_required() for name, field in fields.items()
        }
        for field in block.fields:
            if field.name != "images":  # its description is the engine's
                assert field.description == fields[field.name].description
        assert block.outputs == [output.name for output in manifest.describe_outputs()]
