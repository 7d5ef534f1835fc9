"""Adapters: published layouts, files that do not fit, and IDs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.adapters import Adapter, load_adapter, save_adapter
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.releases import read_config_file
from moondream_cv.model.variants import fetch_variant, variant_cache
from tests.helpers.small_checkpoint import small_config

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = small_config()
SECRET = "the-secret-key"


def state(config: MoondreamConfig = CONFIG, rank: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    text, tensors = config.text, {}
    qkv = (text.n_heads + 2 * text.n_kv_heads) * text.head_dim
    for i in range(text.n_layers):
        for name, size_in, size_out in (
            ("mixer.Wqkv", text.dim, qkv),
            ("mixer.out_proj", text.dim, text.dim),
            ("mlp.fc1", text.dim, text.ff_dim),
            ("mlp.fc2", text.ff_dim, text.dim),
        ):
            stem = f"text_model.transformer.h.{i}.{name}.parametrizations.weight.0"
            tensors[f"{stem}.A"] = torch.randn(rank, size_in)
            tensors[f"{stem}.B"] = torch.randn(size_out, rank)
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k.replace("text_model.transformer.h", "text.blocks")
        .replace("mixer.Wqkv", "attn.qkv")
        .replace("mixer.out_proj", "attn.proj")
        .replace(".parametrizations.weight.0", ""): v
        for k, v in tensors.items()
    }


def load(source: str | Path, dtype: torch.dtype = torch.float32) -> Adapter:
    return load_adapter(source, CONFIG, "cpu", dtype)


def assert_same(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    names = renamed(tensors)
    assert len(adapter.layers) == CONFIG.text.n_layers
    for i, layer in enumerate(adapter.layers):
        for block, projections in (("attn", ("qkv", "proj")), ("mlp", ("fc1", "fc2"))):
            for projection in projections:
                a, b = layer[block][projection]
                assert torch.equal(a, names[f"text.blocks.{i}.{block}.{projection}.A"])
                assert torch.equal(b, names[f"text.blocks.{i}.{block}.{projection}.B"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("short", [False, True])
def test_every_key_layout_gives_the_same_adapter(tmp_path: Path, suffix: str, short: bool) -> None:
    path, tensors = tmp_path / f"adapter{suffix}", state()
    written = renamed(tensors) if short else tensors
    torch.save(written, path) if suffix == ".pt" else save_file(written, path)
    assert_same(load(path), tensors)
    assert_same(load(str(path)), tensors)
    assert load(path, torch.bfloat16).layers[0]["attn"]["qkv"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_adapter_loads_again(tmp_path: Path, suffix: str) -> None:
    torch.save(state(), tmp_path / "first.pt")
    save_adapter(load(tmp_path / "first.pt"), tmp_path / "new" / f"second{suffix}")
    assert_same(load(tmp_path / "new" / f"second{suffix}"), state())
    with pytest.raises(ValueError, match="txt"):
        save_adapter(load(tmp_path / "first.pt"), tmp_path / "adapter.txt")


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_golden_adapters_fit_only_their_checkpoint(name: str) -> None:
    config = MoondreamConfig.from_dict(read_config_file(GOLDEN / name / "config.json"))
    adapter = load_adapter(GOLDEN / name / "adapter.pt", config, "cpu", torch.float32)
    assert len(adapter.layers) == config.text.n_layers
    other = {"mha": "gqa", "gqa": "mha"}[name]
    with pytest.raises(CheckpointError, match=r"does not fit|is not an adapter"):
        load_adapter(GOLDEN / other / "adapter.pt", config, "cpu", torch.float32)


def test_projection_may_be_missing_in_all_layers(tmp_path: Path) -> None:
    torch.save({k: v for k, v in state().items() if "Wqkv" in k}, tmp_path / "a.pt")
    layers = load(tmp_path / "a.pt").layers
    assert all(set(layer["attn"]) == {"qkv"} and not layer["mlp"] for layer in layers)


def test_adapter_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    path, stem = tmp_path / "a.pt", "text_model.transformer.h.1.mlp.fc1.parametrizations.weight.0"
    tensors = state()
    del tensors[f"{stem}.B"]
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"1 keys missing: text\.blocks\.1\.mlp\.fc1\.B"):
        load(path)
    torch.save(state() | {f"{stem}.B": torch.zeros(128, 4)}, path)
    with pytest.raises(CheckpointError, match=r"wrong shape: text\.blocks\.1\.mlp\.fc1 \(A \[3, 64\], B \[128, 4\]"):
        load(path)
    torch.save(state() | {f"{stem}.B": torch.tensor(1.0)}, path)
    with pytest.raises(CheckpointError, match="wrong shape"):
        load(path)
    torch.save(state(small_config(layers=3)), path)
    with pytest.raises(CheckpointError, match=r"2 layers; 8 unexpected keys: text_model\.transformer\.h\.2"):
        load(path)
    torch.save(state() | renamed({f"{stem}.B": state()[f"{stem}.B"]}), path)
    with pytest.raises(CheckpointError, match="are the same tensor"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04"])
def test_damaged_adapter_files_raise(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "source",
    [
        "missing.pt",
        "folder/missing",
        "../../etc/passwd",
        "..",
        ".",
        "",
        "a b",
        "x" * 300,
        "a\nb",
        "~nobody-here/a",
        "a\0b",
    ],
)
def test_sources_that_are_neither_files_nor_ids_raise(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOONDREAM_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="adapter"):
        load(source)
    assert not (tmp_path / "home").exists()


def test_variant_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    assert variant_cache() == Path("~/.cache/huggingface/hub/md_variants").expanduser()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert variant_cache() == tmp_path / "hub" / "md_variants"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert variant_cache() == tmp_path / "c" / "md_variants"


def test_cached_id_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"'ft_1' is not in .*md_variants, and HF_HUB_OFFLINE is set"):
        load("ft_1")
    path = tmp_path / "md_variants" / "ft_1" / "final.pt"
    path.parent.mkdir(parents=True)
    torch.save(state(), path)
    assert_same(load("ft_1"), state())


class _Service(BaseHTTPRequestHandler):
    """Serve variants at /v1/variants/<id>/download."""

    body = b""
    status = 200
    length: int | None = None
    location: str | None = None
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012 - reset by the fixture

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("X-Moondream-Auth")))
        redirect = self.location if self.path.endswith("/download") else None
        self.send_response(302 if redirect else self.status)
        if redirect:
            self.send_header("Location", redirect)
        length = len(self.body) if self.length is None else self.length
        self.send_header("Content-Length", str(0 if redirect else length))
        self.end_headers()
        if not redirect:
            self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Service]]:
    torch.save(state(), tmp_path / "served.pt")

    class Service(_Service):
        body = (tmp_path / "served.pt").read_bytes()
        seen: list[tuple[str, str | None]] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOONDREAM_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("MOONDREAM_API_KEY", SECRET)
    yield Service
    server.shutdown()
    server.server_close()


def cached_files(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_id_is_fetched_once(service: type[_Service], tmp_path: Path) -> None:
    assert_same(load("ft_1"), state())
    assert_same(load("ft_1"), state())
    assert service.seen == [("/v1/variants/ft_1/download", SECRET)]
    assert cached_files(tmp_path) == ["final.pt"]


def test_api_key_is_not_sent_to_another_host(service: type[_Service], tmp_path: Path) -> None:
    class Storage(_Service):
        body = service.body
        seen: list[tuple[str, str | None]] = []  # noqa: RUF012

    storage = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    threading.Thread(target=storage.serve_forever, daemon=True).start()
    service.location = f"http://127.0.0.1:{storage.server_port}/signed"
    assert_same(load("ft_1"), state())
    storage.shutdown()
    storage.server_close()
    assert service.seen == [("/v1/variants/ft_1/download", SECRET)]
    assert Storage.seen == [("/signed", None)]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "missing or wrong"),
        (403, "no access"),
        (404, "does not exist"),
        (429, "number of requests"),
        (500, "out of order"),
    ],
)
def test_failed_downloads_leave_no_file_and_hide_the_key(
    service: type[_Service], tmp_path: Path, status: int, reason: str
) -> None:
    service.status = status
    with pytest.raises(CheckpointError, match=reason) as caught:
        fetch_variant("ft_1")
    assert SECRET not in str(caught.value)
    assert cached_files(tmp_path) == []


def test_broken_downloads_leave_no_file(service: type[_Service], tmp_path: Path) -> None:
    service.length = len(service.body) + 10
    with pytest.raises(CheckpointError, match="ft_1"):
        fetch_variant("ft_1")
    service.length, service.body = None, b"<html>"
    with pytest.raises(
        CheckpointError, match=r"127\.0\.0\.1:\d+ answered with a web page \(status 200\) instead of the adapter"
    ):
        fetch_variant("ft_1")
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:9", "file:///etc", "nonsense", "http://user:hidden@127.0.0.1:9", "http://127.0.0.1:99999"],
)
def test_unreachable_service_raises(service: type[_Service], monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("MOONDREAM_ENDPOINT", endpoint)
    with pytest.raises(
        CheckpointError, match=r"MOONDREAM_ENDPOINT|cannot fetch the adapter 'ft_1' from http://127.*no connection to"
    ) as caught:
        fetch_variant("ft_1")
    assert SECRET not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_malformed_key_is_not_in_the_message(service: type[_Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", f"{SECRET}\nInjected: x")
    with pytest.raises(CheckpointError, match="MOONDREAM_API_KEY is malformed") as caught:
        fetch_variant("ft_1")
    assert SECRET not in str(caught.value)
    assert service.seen == []
