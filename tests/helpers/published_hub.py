"""The known releases of Moondream 2 on a local hub, with weights of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from moondream_cv.model import releases, sources
from moondream_cv.model.releases import Release
from tests.helpers.hub import Hub
from tests.helpers.small_checkpoint import byte_tokenizer, small_config, write_small

REPO, RELEASE, EARLIER = "vikhyatk/moondream2", "2025-06-21", "2025-04-14"
TOKENIZER_REPO = "moondream/starmie-v1"
FOUR_BIT = "moondream/moondream-2b-2025-04-14-4bit"
PUBLISHED_CONFIG = json.dumps(
    {
        "model_type": "moondream1",
        "architectures": ["HfMoondream"],
        "auto_map": {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"},
        "torch_dtype": "float32",
    }
).encode()
EARLIER_TEMPLATES = {
    "caption": {"short": [20, 21], "normal": [20, 22]},
    "query": {"prefix": [24], "suffix": [30]},
    "detect": {"prefix": [25], "suffix": [30]},
    "point": {"prefix": [26], "suffix": [30]},
}


@dataclass
class Published:
    """A local hub with the published layout and small weights.

    Attributes:
        hub: Hub.
        weights: Content of the weights.
        release: Commit of the current release.
        main: Commit of the main branch.
        earlier: Commit of an earlier release.
    """

    hub: Hub
    weights: bytes
    release: str
    main: str
    earlier: str


def tokenizer_json(**options: Any) -> bytes:
    return str(byte_tokenizer(**options).to_str()).encode()


def weights(seed: int, folder: Path) -> bytes:
    write_small(folder, seed=seed)
    return (folder / "model.safetensors").read_bytes()


def packed(content: bytes, folder: Path) -> bytes:
    """Return weights with the decoder MLPs quantized to 4 bits."""
    (folder / "plain.safetensors").write_bytes(content)
    tensors = load_file(folder / "plain.safetensors")
    for name in [name for name in tensors if ".text.blocks" in name and ".mlp." in name and name.endswith(".weight")]:
        groups = tensors.pop(name).numel() // 128
        tensors[f"{name}.packed"] = torch.full((groups // 2, 128), 0x87, dtype=torch.uint8)
        tensors[f"{name}.scale"] = torch.full((groups, 1), 0.01)
        tensors[f"{name}.zero_point"] = torch.full((groups, 1), 7.0)
    return bytes(save(tensors))


@contextmanager
def published_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    """Run a hub with small releases, set `HF_ENDPOINT` to it, and use an empty cache."""
    small = small_config()
    earlier = replace(small, tokenizer=replace(small.tokenizer, bos_id=1, eos_id=1, templates=EARLIER_TEMPLATES))
    known = (Release(REPO, RELEASE, small, TOKENIZER_REPO), Release(REPO, EARLIER, earlier))
    monkeypatch.setattr(releases, "RELEASES", known)
    monkeypatch.setattr(sources, "RELEASES", known)
    monkeypatch.setattr(releases, "_BY_SIZE", known[:1])
    with Hub() as hub:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        first = {
            "config.json": PUBLISHED_CONFIG,
            "hf_moondream.py": b"raise AssertionError",
            "README.md": b"x" * 10_000,
            "tokenizer.json": tokenizer_json(control_tokens=["<a>", "<b>"]),  # of earlier releases
        }
        old = weights(1, tmp_path / "old")
        new = weights(0, tmp_path / "new")
        commits = [
            hub.add(REPO, {**first, "model.safetensors": old}, [EARLIER]),
            hub.add(REPO, {**first, "model.safetensors": new}, [RELEASE]),
            hub.add(REPO, {**first, "README.md": b"newer", "model.safetensors": new}, ["main"]),
        ]
        hub.add(TOKENIZER_REPO, {"tokenizer.json": tokenizer_json(), "README.md": b"x"})
        yield Published(hub, new, commits[1], commits[2], commits[0])
