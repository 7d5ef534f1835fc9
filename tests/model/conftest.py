"""Fixtures for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.published_hub import Published, published_hub


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    """Publish the supported releases with small sizes on a hub at `HF_ENDPOINT`; the cache is empty."""
    with published_hub(tmp_path, monkeypatch) as hub:
        yield hub
