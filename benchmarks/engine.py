"""Time of many classes, many images and mixed skills, relative to one class on one image in the same run.

    python benchmarks/engine.py                  # the tiny model, and full sizes with few layers and random weights
    python benchmarks/engine.py --tiny           # only the tiny model: half a minute

Times are medians of 10 calls (3 for the full sizes).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from _common import random_model, seconds
from torch import Tensor

from moondream_cv import Caption, Detect, Detector, Point, Query, Settings, load
from moondream_cv.engine.crops import Crops, cut_crops, normalize
from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.kv_cache import prefill_images
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.prompts import embed_prompts, write_prompt
from moondream_cv.images import to_rgb
from moondream_cv.model.region import bin_to_coordinate, bin_to_size
from moondream_cv.model.text import attention
from moondream_cv.requests import DetectResult, Request
from moondream_cv.scenes.render import render_scene

PRESENT = ["red circle", "blue square", "dog", "green star", "car", "yellow ring", "cat", "purple cross"]
ABSENT = [
    *("black heart", "white diamond", "bus", "bicycle", "tree", "apple", "pizza", "clock", "horse", "cow", "bird"),
    *("fish", "rocket", "train", "guitar", "phone", "key", "cup", "cake", "house", "boat", "banana", "orange circle"),
    "red square",
]
FEW = Settings(max_objects=3, temperature=0.0, max_tokens=9)  # the same number of steps for every skill
PROMPTS = 64


def scene_frame(seed: int) -> np.ndarray:
    """Return a [480, 640, 3] BGR frame with one object of each class of `PRESENT`."""
    scene = render_scene(seed, resolution_wh=(640, 480), names=PRESENT, style="plain")
    return np.ascontiguousarray(scene.image[..., ::-1])


def report(name: str, duration: float, base: float, base_name: str, target: str = "") -> None:
    """Print a duration in milliseconds and its ratio to a base."""
    print(f"{name:46} {1000 * duration:9.1f} ms {duration / base:7.2f} × {base_name:24} {target}", flush=True)


def many(
    model: LocalModel, frames: Sequence[np.ndarray], settings: Settings, repeat: int, targets: dict[int, str]
) -> None:
    """Compare several classes with one on a frame, eight frames with one, and mixed skills with single calls."""

    def classes(count: int) -> Callable[[], object]:
        requests = [Detect(frames[0], name, settings) for name in (PRESENT + ABSENT)[:count]]
        return lambda: model.run(requests)

    one = seconds(classes(1), repeat)
    report("1 class on 1 frame", one, one, "itself")
    for count in (8, 32):
        report(f"{count} classes on 1 frame", seconds(classes(count), repeat), one, "1 class", targets.get(count, ""))
    whole = [Detect(frame, PRESENT[0], settings) for frame in frames]
    report(f"1 class on {len(frames)} frames", seconds(lambda: model.run(whole), repeat), one, "1 frame")
    mixed: list[Request] = []
    for frame in frames[:2]:
        mixed += [Detect(frame, "dog", settings), Point(frame, "car", settings)]
        mixed += [Query(frame, "How many dogs are there?", settings=settings), Caption(frame, "short", settings)]
    apart = seconds(lambda: [model.run([request]) for request in mixed], max(1, repeat // 3))
    together = seconds(lambda: model.run(mixed), max(1, repeat // 3))
    report("4 skills on each of 2 frames", together, apart, "one after another")


class PlainCache:
    """KV cache of one layer in the simplest form: one buffer with a copy of the prefix for each class."""

    def __init__(self, keys: Tensor, values: Tensor, num_seqs: int, max_entries: int) -> None:
        self.end = keys.shape[2]
        self.buffer = keys.new_zeros(2, num_seqs, keys.shape[1], self.end + max_entries, keys.shape[3])
        self.buffer[0, :, :, : self.end], self.buffer[1, :, :, : self.end] = keys, values

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = q.shape[1]
        stop = self.end + steps
        self.buffer[0, :, :, self.end : stop] = k.transpose(1, 2)
        self.buffer[1, :, :, self.end : stop] = v.transpose(1, 2)
        mask = torch.ones(steps, stop, dtype=torch.bool).tril(self.end) if steps > 1 else None
        self.end = stop
        return attention(
            q, self.buffer[0, :, :, :stop].transpose(1, 2), self.buffer[1, :, :, :stop].transpose(1, 2), mask
        )


@torch.inference_mode()
def bare_encoding(model: LocalModel, crops: Crops) -> None:
    """Run only the network to encode an image whose crops are cut."""
    network = model.network
    features = network.vision(normalize(torch.from_numpy(crops.pixels), network.dtype))
    embedding = network.vision.join(features, [crops.tiling])
    bos = network.text.embed(torch.tensor([[model.config.tokenizer.bos_id]]))
    prefill_images(network, torch.cat((bos, embedding), 1), None)


@torch.inference_mode()
def bare_decoding(model: LocalModel, encoded: EncodedImage, names: Sequence[str], objects: int) -> None:
    """Run only the network to find a number of objects of each class: prompts, decoding steps and heads."""
    network, region = model.network, model.network.region
    prompts = [write_prompt(Detect(encoded, n), model.tokenizer, model.config.tokenizer) for n in names]
    longest = max(len(p.ids) for p in prompts)
    inputs = torch.stack(
        [torch.nn.functional.pad(e, (0, 0, longest - len(e), 0)) for e in embed_prompts(network, prompts)]
    )
    caches = [PlainCache(k, v, len(names), longest + 3 * objects) for k, v in encoded.prefix.layers]

    def step(x: Tensor) -> Tensor:
        start = caches[0].end
        positions = torch.arange(start, start + x.shape[1])[None]
        return network.text(x, positions, attends=caches)[:, -1]

    hidden = step(inputs)
    for _ in range(objects):
        network.text.logits(hidden).argmax(-1)
        for _ in range(2):
            logits = region.decode_coordinate(hidden)
            coordinate = bin_to_coordinate(logits.argmax(-1), logits.shape[-1])
            hidden = step(region.encode_coordinate(coordinate.to(hidden.dtype)[:, None])[:, None])
        logits = region.decode_size(hidden)
        hidden = step(region.encode_size(bin_to_size(logits.argmax(-1), logits.shape[-1]).to(hidden.dtype))[:, None])
    network.text.logits(hidden).argmax(-1).tolist()


def overhead(model: LocalModel, frame: np.ndarray, repeat: int) -> None:
    """Compare a `Detector` call with the forward passes in it."""
    encoded, detector = model.encode_image(frame), Detector(model)
    crops = cut_crops(to_rgb(frame), model.config.vision)
    for names in (PRESENT[:1], PRESENT):
        found = [r.objects for r in model.run([Detect(encoded, n) for n in names]) if isinstance(r, DetectResult)]
        assert {len(objects) for objects in found} == {1}, "bare_decoding assumes one object per class"
        decoding = seconds(lambda names=names: bare_decoding(model, encoded, names, 1), repeat)  # type: ignore[misc]
        networks = decoding + seconds(lambda: bare_encoding(model, crops), repeat)
        encoding = decoding + seconds(lambda: model.encode_image(frame), repeat)
        call = seconds(lambda names=names: detector(frame, names), repeat)  # type: ignore[misc]
        kept = seconds(lambda names=names: detector(encoded, names), repeat)  # type: ignore[misc]
        what = f"Detector, {len(names)} class{'es' * (len(names) > 1)}"
        report(what, call, encoding, "encode, prefill, steps", "target 1.5")
        report(f"{what}, on an encoded frame", kept, decoding, "prefill, steps")
        report(what, call, networks, "the same with cut crops")
    cutting = seconds(lambda: cut_crops(to_rgb(frame), model.config.vision), repeat)
    report("Cutting a frame into crops", cutting, call, "Detector, 8 classes")


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(prompts: int, answers: multiprocessing.Queue[int]) -> None:
    """Measure the peak memory of a run beyond the weights, in bytes. Runs in a separate process.

    Args:
        prompts: Number of prompts on one image.
        answers: Queue for the result.
    """
    model = random_model(2, None, torch.device("cpu"))
    frame, before = cv2.resize(scene_frame(5), (1920, 1080)), peak_bytes()
    model.run([Detect(frame, f"{n} circles", Settings(max_objects=3)) for n in range(prompts)])
    answers.put(peak_bytes() - before)


def measure_memory() -> None:
    """Print the memory of one prompt and of many prompts on one image."""
    context = multiprocessing.get_context("spawn")
    taken = []
    for prompts in (1, PROMPTS):
        answers: multiprocessing.Queue[int] = context.Queue()
        process = context.Process(target=memory, args=(prompts, answers))
        process.start()
        taken.append(answers.get())
        process.join()
        target = "target 1000 MB" if prompts == PROMPTS else ""
        print(f"memory beyond the weights, {prompts:2} prompts {taken[-1] / 1e6:16.0f} MB {target:>40}", flush=True)
    print(f"memory for each further prompt {(taken[1] - taken[0]) / (PROMPTS - 1) / 1e6:24.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run only the tiny model")
    parser.add_argument(
        "--layers", type=int, default=3, help="layers of the full-size encoder and decoder (default: 3)"
    )
    parser.add_argument("--repeat", type=int, default=10, help="timed calls per measurement (default: 10)")
    arguments = parser.parse_args()
    frames = [scene_frame(seed) for seed in range(5, 13)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 640x480")
    print("\nThe tiny model, float32")
    with load("tiny", device="cpu") as model:
        many(model, frames, Settings(), arguments.repeat, {8: "target 1.6", 32: "target 2.0"})
        overhead(model, frames[0], arguments.repeat)
    if arguments.tiny:
        return
    print(f"\nThe full sizes with {arguments.layers} layers of 27 and 24, random weights, bfloat16, 3 objects each")
    with random_model(arguments.layers, arguments.layers, torch.device("cpu")) as model:
        many(model, frames, FEW, max(1, arguments.repeat // 3), {8: "target 1.3"})
    print("\nThe full sizes with 2 layers of the encoder and all of the decoder, bfloat16, 3 objects each, 1920x1080")
    measure_memory()


if __name__ == "__main__":
    main()
