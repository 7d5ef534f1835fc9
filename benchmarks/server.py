"""Measure the server under load: correctness, throughput, latency of detections during captions, and a full queue.

    python benchmarks/server.py

The server runs the tiny model in a separate process and shares the cores of the machine with the clients. The ratios
compare measurements within one run: 32 concurrent clients with a single client that sends the same requests one after
another, and detections during 8 streamed captions with detections alone.
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
TOLERANCE = 2e-3  # relative to the image size; the order of sums depends on the batch
HttpRequest = tuple[str, bytes]  # path and body; encoded in advance to exclude the work of the client


@contextmanager
def server(*options: str) -> Iterator[str]:
    """Run a server of the tiny model and yield its URL."""
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
    """Wait until a server accepts requests."""
    for _ in range(600):
        try:
            async with client.get(f"{url}/ready") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(0.1)
    raise RuntimeError("the server did not become ready")


def make_requests(images: int, per_image: int) -> list[list[HttpRequest]]:
    """Return requests with all skills, grouped by image."""
    settings = {"temperature": 0}
    rng = random.Random(0)
    requests_by_image = []
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
        requests_by_image.append(
            [(path, json.dumps({**body, "image_url": uri}).encode()) for path, body in of_image[:per_image]]
        )
    return requests_by_image


def streamed(body: bytes) -> bytes:
    """Return the body of a streamed caption of normal length."""
    return json.dumps({**json.loads(body), "length": "normal", "stream": True}).encode()


def session() -> aiohttp.ClientSession:
    """Return a client session without a limit on connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(300))


async def send(client: aiohttp.ClientSession, url: str, request: HttpRequest) -> tuple[int, Any]:
    """Send a request. Return the status and the JSON body of the response."""
    path, body = request
    async with client.post(url + path, data=body, headers=JSON) as answer:
        return answer.status, await answer.json()


def same(one: Any, other: Any) -> bool:
    """Return whether two answers are equal, except for IDs and rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - {"request_id", "logprob"}
        return all(key in one and key in other and same(one[key], other[key]) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE
    return bool(one == other)


async def one_by_one(url: str, requests_by_image: list[list[HttpRequest]]) -> tuple[list[list[Any]], float]:
    """Send requests one after another. Return the answers and the requests per second."""
    async with session() as client:
        await until_ready(client, url)
        start = time.perf_counter()
        answers = [[await send(client, url, one) for one in of_image] for of_image in requests_by_image]
        taken = time.perf_counter() - start
    assert all(status == 200 for of_image in answers for status, _ in of_image)
    return [[found for _, found in of_image] for of_image in answers], sum(map(len, requests_by_image)) / taken


async def at_once(
    url: str, requests_by_image: list[list[HttpRequest]], alone: list[list[Any]], clients: int
) -> dict[str, Any]:
    """Send the same requests from concurrent clients, with separate images, and compare the answers with `alone`."""
    wrong, statuses = 0, Counter[int]()

    async def go(first: int) -> None:
        nonlocal wrong
        for i in range(first, len(requests_by_image), clients):
            for one, expected in zip(requests_by_image[i], alone[i], strict=True):
                status, found = await send(client, url, one)
                statuses[status] += 1
                wrong += not same(found, expected)

    # Send all requests
    async with session() as client:
        await until_ready(client, url)
        start = time.perf_counter()
        await asyncio.gather(*map(go, range(clients)))
        rate = sum(statuses.values()) / (time.perf_counter() - start)
        async with client.get(f"{url}/metrics") as answer:
            lines = (await answer.text()).splitlines()

    # Summarize
    batches = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("moondream_cv_batch_rows")}
    return {
        "answers by status": dict(statuses),
        "wrong answers": wrong,
        "requests per second": round(rate, 1),
        "requests per step": round(
            batches["moondream_cv_batch_rows_sum"] / batches["moondream_cv_batch_rows_count"], 1
        ),
    }


def load(clients: int, requests: int, per_image: int, *options: str) -> None:
    """Compare sequential and concurrent requests, each on a new server."""
    requests_by_image = make_requests(requests // per_image, per_image)
    with server(*options) as url:
        alone, rate = asyncio.run(one_by_one(url, requests_by_image))
    with server(*options) as url:
        found = asyncio.run(at_once(url, requests_by_image, alone, clients))
    found |= {"requests per second, sequential": round(rate, 1), "ratio": round(found["requests per second"] / rate, 2)}
    print(json.dumps(found), flush=True)


async def during_captions(url: str, captions: int, detections: int) -> dict[str, Any]:
    """Measure the latency of detections alone and during streamed captions."""
    # Prepare the requests
    requests_by_image = make_requests(40, 5)
    wanted = [one for of_image in requests_by_image for one in of_image if one[0] == "/v1/detect"]
    talk = [
        (path, streamed(body)) for of_image in requests_by_image for path, body in of_image if path == "/v1/caption"
    ]
    stop = False
    async with session() as client:
        await until_ready(client, url)

        async def stream(number: int) -> int:
            """Request one caption after another."""
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
                status, _ = await send(client, url, wanted[k % len(wanted)])
                assert status == 200
                times.append(time.perf_counter() - start)
            return times

        # Measure detections alone, after a warm-up
        await measure()
        alone = await measure()

        # Measure detections during captions
        streams = [asyncio.create_task(stream(number)) for number in range(captions)]
        await asyncio.sleep(1)
        during = await measure()
        stop = True
        num_captions = sum(await asyncio.gather(*streams))

    # Summarize
    figures = {}
    for name, times in (("alone", alone), (f"during {captions} captions", during)):
        p99 = statistics.quantiles(times, n=100)[98]
        figures[f"detection {name}, median and p99, ms"] = [
            round(1e3 * statistics.median(times), 1),
            round(1e3 * p99, 1),
        ]
    ratio = statistics.quantiles(during, n=100)[98] / statistics.quantiles(alone, n=100)[98]
    return {**figures, "captions streamed": num_captions, "ratio of p99": round(ratio, 2)}


async def full_queue(url: str, requests: int) -> dict[str, Any]:
    """Send many concurrent requests to a server with a short queue."""
    one = make_requests(1, 5)[0][0]
    async with session() as client:
        await until_ready(client, url)
        answers = await asyncio.gather(*(send(client, url, one) for _ in range(requests)))
    return {"answers by status": dict(Counter(status for status, _ in answers))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32, help="Number of concurrent clients.")
    parser.add_argument("--requests", type=int, default=2000, help="Number of requests.")
    parser.add_argument("--detections", type=int, default=200, help="Number of measured detections.")
    arguments = parser.parse_args()
    print(f"{arguments.clients} clients, {arguments.requests} requests of all skills, JPEG scenes of 128 to 800 pixels")
    for per_image, cached in ((5, 64), (1, 0)):
        print(f"{per_image} requests per image, cache of {cached} encoded images:", end=" ", flush=True)
        load(arguments.clients, arguments.requests, per_image, "--cache-images", str(cached))
    print("Detections during 8 streamed captions, no cache of encoded images:", end=" ", flush=True)
    with server("--cache-images", "0") as url:
        print(json.dumps(asyncio.run(during_captions(url, 8, arguments.detections))), flush=True)
    print("200 concurrent requests, queue of 8:", end=" ", flush=True)
    with server("--queue", "8") as url:
        print(json.dumps(asyncio.run(full_queue(url, 200))))


if __name__ == "__main__":
    main()
