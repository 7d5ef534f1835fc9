"""Image decoding in processes: time limit, crashes, fairness between clients.

Run with `pytest tests/server/test_image_decoding.py`.
"""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import ImageError
from moondream_cv.server.image_decoding import DecoderPool, FairSlots
from tests.helpers.served import data_uri, served
from tests.helpers.waiting import until

LARGE = (7000, 7000)  # 49 million pixels: half a second of decoding on any machine


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture
def decoders():
    made = DecoderPool(50_000_000, timeout=240)
    yield made
    made.close()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "decoder_process" in " ".join(child.cmdline())]


def test_decoded_pixels_equal_those_of_to_rgb(decoders: DecoderPool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 77, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    before = len(children())
    for _ in range(3):
        assert np.array_equal(decoders.decode(file.getvalue()), pixels)
    assert len(children()) == before + 1  # the same process is used again
    decoders.close()
    assert len(children()) == before


def test_image_errors_keep_their_message(decoders: DecoderPool) -> None:
    with pytest.raises(ImageError, match="is not an image in a supported format"):
        decoders.decode(b"hello")
    with pytest.raises(ImageError, match="too large: 8000x7000 pixels"):
        decoders.decode(png((8000, 7000)))
    assert decoders.decode(png((4, 4))).shape == (4, 4, 3)


def test_slow_image_kills_its_decoder_process() -> None:
    decoders = DecoderPool(50_000_000, timeout=0.01)
    with pytest.raises(ImageError, match=r"took longer than 0\.01 s to decode"):
        decoders.decode(png(LARGE))
    decoders._timeout = 240
    assert decoders.decode(png((4, 4))).shape == (4, 4, 3)
    decoders.close()


def test_crashed_decoder_is_replaced(decoders: DecoderPool) -> None:
    decoders.decode(png((4, 4)))
    decoders._idle[0]._process.kill()
    with pytest.raises(ImageError, match="cannot be decoded"):
        decoders.decode(png((4, 4)))
    assert decoders.decode(png((4, 4))).shape == (4, 4, 3)


def test_clients_acquire_slots_in_turn() -> None:
    async def run() -> list[str]:
        slots, order = FairSlots(2), []

        async def work(client: str) -> None:
            await slots.acquire(client)
            order.append(client)
            await asyncio.sleep(0)
            slots.release(client)

        await asyncio.gather(*(work(client) for client in "aaaaabbc"))
        return order

    order = asyncio.run(run())
    assert sorted(order) == sorted("aaaaabbc")
    third_of_a = [place for place, client in enumerate(order) if client == "a"][2]
    assert order.index("c") < third_of_a


def test_one_client_never_occupies_all_slots() -> None:
    async def run() -> None:
        slots = FairSlots(2)
        await slots.acquire("a")
        second = asyncio.ensure_future(slots.acquire("a"))
        await asyncio.sleep(0)
        await slots.acquire("b")  # without waiting
        assert not second.done()
        slots.release("b")
        await asyncio.sleep(0)
        assert not second.done()
        second.cancel()
        slots.release("a")
        await slots.acquire("a")  # a cancelled waiter holds no slot

    asyncio.run(run())


def test_images_of_one_client_do_not_delay_other_clients(tiny: LocalModel) -> None:
    slow = {"image_url": data_uri(Image.new("RGB", LARGE)), "object": "cat"}
    small = {"image_url": data_uri(Image.new("RGB", (64, 64))), "object": "cat"}
    other = httpx.HTTPTransport(local_address="127.0.0.2")
    with served(tiny, decode_timeout=240, keep=1) as server, ThreadPoolExecutor() as pool:
        url = server.url.replace("localhost", "127.0.0.1")
        with httpx.Client(transport=other, base_url=url, timeout=240) as client:
            answers = [pool.submit(server.post, "/v1/detect", slow) for _ in range(4)]
            until(lambda: server.service.in_flight == 4)
            assert client.post("/v1/detect", json=small).status_code == 200
            assert not all(answer.done() for answer in answers)
            assert {answer.result().status_code for answer in answers} == {200}
