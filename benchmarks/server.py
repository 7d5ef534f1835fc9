"""The server under load: answers checked one by one, throughput, how late a detection is beside captions, a full queue.

    python benchmarks/server.py

A server of the tiny model in a process of its own and the clients in this one share the machine's cores. Ratios within
one run: 32 clients beside one that asks the same things one after another; detections while 8 captions stream beside
detections alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from PIL import Image

from moondream_cv.scenes import render_scene

JSON = {"Content-Type": "application/json"}
NAMES = ("red circle", "blue square", "cat", "green triangle")
TOLERANCE = 2e-3  # of the image: requests that decode together add up in another order
Asked = tuple[str, bytes]  # path and body, written beforehand: a client's own work is not the server's


@contextmanager
def server(*options: str) -> Iterator[str]:
    """A server of the tiny model; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moondream_cv", "serve", "--model", "tiny", "--port", str(port), *options]
    process = subprocess.Popen([*command, "--log-level", "warning"], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


async def until_ready(client: aiohttp.ClientSession, url: str) -> None:
    for _ in range(600):
        try:
            async with client.get(f"{url}/ready") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(0.1)
    raise RuntimeError("the server did not become ready")


def questions(images: int, per_image: int) -> list[list[Asked]]:
    """What clients ask: for each image a few things of all skills."""
    settings = {"temperature": 0}
    rng = random.Random(0)
    asked = []
    for seed in range(images):
        file = io.BytesIO()
        Image.fromarray(render_scene(seed, names=NAMES).image).save(file, "JPEG", quality=95)
        uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        of_image: list[tuple[str, dict[str, Any]]] = [
            ("/v1/detect", {"object": "red circle"}),
            ("/v1/query", {"question": "How many cats are there?", "settings": settings}),
            ("/v1/point", {"object": "blue square"}),
            ("/v1/caption", {"length": "short", "settings": settings}),
            ("/v1/detect", {"object": "cat"}),
        ]
        rng.shuffle(of_image)
        asked.append([(path, json.dumps({**body, "image_url": uri}).encode()) for path, body in of_image[:per_image]])
    return asked


def streamed(body: bytes) -> bytes:
    """A caption of the usual length, as a stream."""
    return json.dumps({**json.loads(body), "length": "normal", "stream": True}).encode()


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(300))


async def ask(client: aiohttp.ClientSession, url: str, asked: Asked) -> tuple[int, Any]:
    path, body = asked
    async with client.post(url + path, data=body, headers=JSON) as answer:
        return answer.status, await answer.json()


def same(one: Any, other: Any) -> bool:
    """Whether two answers say the same, but for ids and rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - {"request_id", "logprob"}
        return all(key in one and key in other and same(one[key], other[key]) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE
    return bool(one == other)


async def one_by_one(url: str, asked: list[list[Asked]]) -> tuple[list[list[Any]], float]:
    """Every answer as it is alone, and how many come in a second."""
    async with session() as client:
        await until_ready(client, url)
        start = time.perf_counter()
        answers = [[await ask(client, url, one) for one in of_image] for of_image in asked]
        taken = time.perf_counter() - start
    assert all(status == 200 for of_image in answers for status, _ in of_image)
    return [[found for _, found in of_image] for of_image in answers], sum(map(len, asked)) / taken


async def at_once(url: str, asked: list[list[Asked]], alone: list[list[Any]], clients: int) -> dict[str, Any]:
    """The same from many clients, each with images of its own; every answer is compared with that of `one_by_one`."""
    wrong, statuses = 0, Counter[int]()

    async def go(first: int) -> None:
        nonlocal wrong
        for i in range(first, len(asked), clients):
            for one, expected in zip(asked[i], alone[i], strict=True):
                status, found = await ask(client, url, one)
                statuses[status] += 1
                wrong += not same(found, expected)

    async with session() as client:
        await until_ready(client, url)
        start = time.perf_counter()
        await asyncio.gather(*map(go, range(clients)))
        rate = sum(statuses.values()) / (time.perf_counter() - start)
        async with client.get(f"{url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
    rows = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("moondream_cv_batch_rows")}
    return {
        "answers by status": dict(statuses),
        "answers that differ": wrong,
        "requests a second": round(rate, 1),
        "rows a step": round(rows["moondream_cv_batch_rows_sum"] / rows["moondream_cv_batch_rows_count"], 1),
    }


def load(clients: int, requests: int, per_image: int, *options: str) -> None:
    """One client after another beside many at once, each on a server that has seen nothing yet."""
    asked = questions(requests // per_image, per_image)
    with server(*options) as url:
        alone, rate = asyncio.run(one_by_one(url, asked))
    with server(*options) as url:
        found = asyncio.run(at_once(url, asked, alone, clients))
    found |= {"one after another": round(rate, 1), "ratio": round(found["requests a second"] / rate, 2)}
    print(json.dumps(found), flush=True)


async def beside_captions(url: str, captions: int, detections: int) -> dict[str, Any]:
    """Latency of detections alone, and while captions stream."""
    asked = questions(40, 5)
    wanted = [one for of_image in asked for one in of_image if one[0] == "/v1/detect"]
    talk = [(path, streamed(body)) for of_image in asked for path, body in of_image if path == "/v1/caption"]
    stop = False
    async with session() as client:
        await until_ready(client, url)

        async def stream(number: int) -> int:
            """Ask for caption after caption."""
            count = 0
            while not stop:
                path, body = talk[(number + count * captions) % len(talk)]
                async with client.post(url + path, data=body, headers=JSON) as answer:
                    async for _ in answer.content:
                        pass
                count += 1
            return count

        async def measure() -> list[float]:
            times = []
            for k in range(detections):
                start = time.perf_counter()
                status, _ = await ask(client, url, wanted[k % len(wanted)])
                assert status == 200
                times.append(time.perf_counter() - start)
            return times

        await measure()
        alone = await measure()
        streams = [asyncio.create_task(stream(number)) for number in range(captions)]
        await asyncio.sleep(1)
        crowded = await measure()
        stop = True
        told = sum(await asyncio.gather(*streams))
    figures = {}
    for name, times in (("alone", alone), (f"beside {captions} captions", crowded)):
        p99 = statistics.quantiles(times, n=100)[98]
        figures[f"a detection {name}, median and p99, ms"] = [
            round(1e3 * statistics.median(times), 1),
            round(1e3 * p99, 1),
        ]
    ratio = statistics.quantiles(crowded, n=100)[98] / statistics.quantiles(alone, n=100)[98]
    return {**figures, "captions streamed meanwhile": told, "ratio of p99": round(ratio, 2)}


async def full_queue(url: str, requests: int) -> dict[str, Any]:
    """Many requests at the same moment at a server whose queue is short."""
    one = questions(1, 5)[0][0]
    async with session() as client:
        await until_ready(client, url)
        answers = await asyncio.gather(*(ask(client, url, one) for _ in range(requests)))
    return {"answers by status": dict(Counter(status for status, _ in answers))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--detections", type=int, default=200)
    arguments = parser.parse_args()
    print(
        f"{arguments.clients} clients, {arguments.requests} requests of all skills, scenes of 128 to 800 pixels in JPEG"
    )
    for per_image, cached in ((5, 64), (1, 0)):
        print(f"{per_image} requests about each image, {cached} encoded images kept:", end=" ", flush=True)
        load(arguments.clients, arguments.requests, per_image, "--cache-images", str(cached))
    print("Detections beside 8 captions that stream, no encoded images kept:", end=" ", flush=True)
    with server("--cache-images", "0") as url:
        print(json.dumps(asyncio.run(beside_captions(url, 8, arguments.detections))), flush=True)
    print("200 requests at once, a queue of 8:", end=" ", flush=True)
    with server("--queue", "8") as url:
        print(json.dumps(asyncio.run(full_queue(url, 200))))


if __name__ == "__main__":
    main()
