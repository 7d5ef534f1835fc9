"""A corpus of hostile requests: each gets a success or a 4xx status, and none leaks resources.

Run with `pytest tests/server/test_hostile.py`.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.served import Served, served
from tests.helpers.waiting import until
from tests.test_image_formats import HOSTILE, bitmap, icon, jp2_of, tiff_with_tile

MIB = 2**20
JSON = {"Content-Type": "application/json"}


def scene_image(kind: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG file with the given size in its header and arbitrary pixel data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def bombs() -> Iterator[tuple[str, bytes]]:
    """Return small files that need much memory or time to decode."""
    zeros = zlib.compress(bytes(30 * MIB), 9)
    yield "png of 60,000 × 60,000", png(60_000, 60_000, zeros)
    yield "png of 2**31 - 1 squared", png(2**31 - 1, 2**31 - 1, zeros)
    yield "png of 1 × 1 with too many pixels", png(1, 1, zeros)
    yield "png of 100 × 100 with too few", png(100, 100, zlib.compress(b"\0"))
    yield "png of 0 × 0", png(0, 0, zeros)
    yield "png with a text that unfolds", png(8, 8, zlib.compress(bytes(200)), png_chunk(b"zTXt", b"a\0\0" + zeros))
    yield "png with a profile that unfolds", png(8, 8, zlib.compress(bytes(200)), png_chunk(b"iCCP", b"a\0\0" + zeros))
    yield "gif of 65,535 × 65,535", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(20) + b";"
    yield (
        "bmp of 2**30 squared",
        b"BM"
        + struct.pack("<IHHI", 0, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield (
        "tiff whose directory points to itself",
        b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 2**31) + struct.pack("<I", 8),
    )
    yield "webp that says it is larger", b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(30)
    yield (
        "jpeg of 65,500 × 65,500",
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\xff\xd9",
    )


def containers() -> Iterator[tuple[str, bytes]]:
    """Return images inside other files, and files for decoders that are disabled."""
    for path in sorted(HOSTILE.iterdir()):
        yield path.name, path.read_bytes()
    yield "png of 60,000 × 60,000 in an icon", icon(png(60_000, 60_000, b""))
    yield "bitmap of 60,000 × 60,000 in an icon", icon(bitmap(60_000, 60_000))
    yield "jpeg 2000 that states another size", jp2_of((20, 20), (2_100, 2_100))
    yield "tiff with a tile of 16,384 × 16,384", tiff_with_tile(16_384, 16_384)


def damaged() -> Iterator[tuple[str, bytes]]:
    """Return truncated files and files with changed bytes."""
    rng = random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"):
        whole = scene_image(kind)
        for share in (0.02, 0.1, 0.3, 0.6, 0.9):
            yield f"{kind} cut at {share}", whole[: int(len(whole) * share)]
        changed = bytearray(whole)
        for _ in range(30):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield f"{kind} changed", bytes(changed)
        yield f"{kind} behind its first bytes changed", whole[:8] + bytes(changed[8:])


def other_files() -> Iterator[tuple[str, bytes]]:
    """Return files that are not images."""
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n"
    yield "pdf", b"%PDF-1.4\n%%EOF"
    yield (
        "pickle",
        b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    )
    yield "npy", b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    yield "zip", b"PK\x03\x04" + bytes(30)
    yield "gzip", b"\x1f\x8b\x08" + bytes(30)
    yield "html", b"<html><script>alert(1)</script></html>"
    yield "nothing", b""
    yield "zeros", bytes(1000)
    yield "0xff", b"\xff" * 1000


URLS = [
    *(f"http://{host}/a.png" for host in (
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "0", "0.0.0.0", "2130706433", "0x7f000001",
        "017700000001", "0177.0.0.1", "0x7f.1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
        "[0:0:0:0:0:0:0:1]", "169.254.169.254", "[fd00:ec2::254]", "[fe80::1]", "[fe80::1%25lo]", "10.0.0.1",
        "192.168.0.1", "172.16.0.1", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "①②⑦.⓪.⓪.①", "127。0。0。1", "user@127.0.0.1", "example.com@127.0.0.1",
        "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:22", "", " ", ".", "%31%32%37.0.0.1", "a" * 300,
    )),
    "file:///etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1:6379/_INFO", "dict://localhost/",
    "jar:http://localhost!/", "http:\\\\127.0.0.1\\a", "http:/127.0.0.1/", "//127.0.0.1/a", "https://127.0.0.1:1/",
    "http://127.0.0.1\t/", "http://127.0.0.1\r\nX-A: b/", "http://127.0.0.1\0/", "javascript:alert(1)",
    "http://127.0.0.1/" + "a" * 10_000, "http://[", "http://]", "http://[::1", "http://:80/", "http://#", "http://?",
]  # fmt: skip

TEXTS = [
    "", " ", "\0", "\0" * 100, "=", "====", "a", "ab=c", "data:", "data:,", "data:image/png;base64",
    "data:;;;;base64,AA",
    "data:image/png;base64," + "=" * 50, "data:" + "a" * 100_000, "A" * 100_001, "../../../etc/passwd", "/dev/zero",
    "/dev/stdin", "\\\\server\\share", "~root", "CON", "${jndi:ldap://127.0.0.1/a}", "{{7*7}}", "\ud800", "😀" * 100,
    "%00", "%2e%2e%2f", "<!--", "'; DROP TABLE images; --", "NaN",
]  # fmt: skip


def images() -> list[tuple[str, str]]:
    """Return hostile values for an image field."""
    files = [*bombs(), *containers(), *damaged(), *other_files()]
    encoded = [(name, base64.b64encode(content).decode()) for name, content in files]
    return [
        *[(name, f"data:image/png;base64,{text}") for name, text in encoded],
        *[(f"url {url[:60]!r}", url) for url in URLS],
        *[(f"text {text[:30]!r}", text) for text in TEXTS],
    ]


IMAGES = images()

SENDERS: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "moondream": lambda image: ("/v1/detect", {"image_url": image, "object": "cat"}),
    "query": lambda image: ("/v1/query", {"image_url": image, "question": "What?", "stream": True}),
    "roboflow": lambda image: (
        "/infer/lmm",
        {"model_id": "moondream2", "prompt": "cat", "image": {"type": "base64", "value": image}},
    ),
    "openai": lambda image: (
        "/v1/chat/completions",
        {
            "model": "moondream2",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": image}},
                    ],
                }
            ],
        },
    ),
    "fal": lambda image: ("/fal-ai/moondream2/object-detection", {"image_url": image, "object": "cat"}),
}

BODIES: list[tuple[str, bytes, dict[str, str]]] = [
    ("nothing", b"", JSON),
    ("half a body", b'{"image_url": "', JSON),
    ("a list", b"[1, 2]", JSON),
    ("null", b"null", JSON),
    ("a number", b"1e999", JSON),
    ("a string", b'"image"', JSON),
    ("NaN", b'{"image_url": NaN, "object": Infinity}', JSON),
    ("a deep list", b"[" * 200_000, JSON),
    ("a deep object", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JSON),
    ("a deep image", b'{"object": "cat", "image_url": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", JSON),
    ("deep settings", b'{"object":"c","image_url":"AAAA","settings":{"a":' + b"[" * 900 + b"]" * 900 + b"}}", JSON),
    ("a long number", b'{"object": "cat", "image_url": ' + b"9" * 100_000 + b"}", JSON),
    ("a long key", b'{"' + b"a" * 1_000_000 + b'": 1}', JSON),
    ("many keys", json.dumps({str(i): i for i in range(50_000)}).encode(), JSON),
    ("a key twice", b'{"object": "a", "object": ["b"], "image_url": "AAAA"}', JSON),
    ("null bytes", b"\0" * 1000, JSON),
    ("wrong utf-8", b'{"object": "\xff\xfe", "image_url": "AAAA"}', JSON),
    ("half a surrogate", b'{"object": "\\ud800", "image_url": "AAAA"}', JSON),
    ("utf-16", '{"object": "cat"}'.encode("utf-16"), JSON),
    ("text", b'{"object": "cat"}', {"Content-Type": "text/plain"}),
    ("xml", b"<a/>", {"Content-Type": "application/xml"}),
    ("no content type", b'{"object": "cat"}', {}),
    ("a broken content type", b"{}", {"Content-Type": "application/json; charset=none; =;"}),
    ("a form", b"object=cat&image_url=AAAA", {"Content-Type": "application/x-www-form-urlencoded"}),
    ("a broken form", b"--x\r\n", {"Content-Type": "multipart/form-data; boundary=x"}),
    ("gzip that is none", b"{}", {**JSON, "Content-Encoding": "gzip"}),
    ("types mixed up", b'{"object": {"a": 1}, "image_url": ["AAAA"], "settings": "none", "stream": "maybe"}', JSON),
    ("huge settings", b'{"object":"c","image_url":"AAAA","settings":{"max_tokens":1e308}}', JSON),
    ("a huge seed", b'{"object":"c","image_url":"AAAA","settings":{"seed":' + b"9" * 4000 + b"}}", JSON),
    ("a long object", b'{"image_url": "AAAA", "object": "' + b"a" * 300_000 + b'"}', JSON),
    ("many refs", json.dumps({"question": "a", "spatial_refs": [[0.5, 0.5]] * 50_000}).encode(), JSON),
]  # fmt: skip
PATHS = ["/v1/caption", "/v1/query", "/v1/detect", "/v1/point", "/v1/batch", "/v1/chat/completions", "/infer/lmm",
         "/infer/lmm/moondream2", "/fal-ai/moondream2", "/fal-ai/moondream2/visual-query",
         "/queue/fal-ai/moondream2"]  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny: LocalModel) -> Iterator[Served]:
    with served(tiny, timeout=240, max_pixels=4_000_000) as running:
        yield running


def check(answer: Any) -> None:
    """Check that a response is a success or a 4xx error with a short message without internal details."""
    assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text[:500]
    assert len(answer.text) < 5_000
    for secret in ("Traceback", "site-packages", "moondream_cv/", "root:"):
        assert secret not in answer.text


@pytest.mark.parametrize("sender", SENDERS)
def test_hostile_images_are_rejected(target: Served, sender: str) -> None:
    refused = 0
    for name, image in IMAGES:
        path, body = SENDERS[sender](image)
        answer = target.client.post(path, content=json.dumps(body).encode(), headers=JSON)
        check(answer)
        changed = "changed" in name or name.startswith("png with a") or "too many" in name or "0.9" in name
        assert changed or answer.status_code >= 400, (name, answer.text[:300])
        refused += answer.status_code >= 400
    assert refused >= 150
    assert target.service.in_flight == 0


@pytest.mark.parametrize("path", PATHS)
def test_hostile_bodies_are_rejected(target: Served, path: str) -> None:
    for name, body, headers in BODIES:
        answer = target.client.post(path, content=body, headers=headers)
        check(answer)
        later = path in (
            "/v1/batch",
            "/queue/fal-ai/moondream2",
        )  # queue requests report errors of images later
        if not later:
            assert answer.status_code >= 400, (name, answer.text[:300])
    until(lambda: target.service.in_flight == 0)


def test_hostile_line_does_not_affect_a_batch(target: Served) -> None:
    good = {"skill": "query", "question": "What?", "settings": {"max_tokens": 3}}
    lines = [json.dumps(good)]
    for _, image in IMAGES:
        lines.append(json.dumps({"skill": "detect", "object": "cat", "image_url": image}))
    lines.append(json.dumps(good))
    answer = target.client.post(
        "/v1/batch", content="\n".join(lines).encode(), headers={"Content-Type": "application/x-ndjson"}
    )
    results = [json.loads(line) for line in answer.text.splitlines()]
    assert len(results) == len(lines)
    assert "result" in results[0]
    assert "result" in results[-1]
    assert sum("error" in line for line in results) >= 150


def test_at_least_200_hostile_inputs_are_tested() -> None:
    assert len(IMAGES) + len(BODIES) >= 200


def test_repeated_hostile_inputs_do_not_grow_memory_or_threads(target: Served) -> None:
    process = psutil.Process(os.getpid())

    def all_once() -> None:
        for _, image in IMAGES:
            path, body = SENDERS["moondream"](image)
            target.client.post(path, content=json.dumps(body).encode(), headers=JSON)
        for _, body, headers in BODIES:
            target.client.post("/v1/detect", content=body, headers=headers)
        gc.collect()

    all_once()
    before, threads = process.memory_info().rss, process.num_threads()
    all_once()
    all_once()
    assert process.memory_info().rss - before < 40 * MIB
    assert process.num_threads() <= threads + 2
    assert target.service.in_flight == 0
