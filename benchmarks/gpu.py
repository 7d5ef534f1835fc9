"""What a GPU does with the full-size model (random weights) and with the tiny one, as ratios within one run.

    python benchmarks/gpu.py                    # the sizes of Moondream 2B in bfloat16: 3.7 GB of device memory
    python benchmarks/gpu.py --device cpu --layers 2 --repeat 2      # the same code on a CPU, to try it

Random weights take as long as real ones. Encoding is compared over resolutions and with `torch.compile`; a decoding
step with the time that reading the weights once takes; the tiny model with itself on the CPU.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from _common import random_model, seconds

from moondream_cv import Query, Settings, load
from moondream_cv.engine.local import LocalModel

RESOLUTIONS = ((640, 480), (1920, 1080))
ROWS = (1, 8, 64)
NAMES = ("dog", "red circle", "star", "bus")


def row(what: str, value: float, ratio: float, against: str) -> None:
    print(f"{what:44} {1000 * value:10.2f} ms   {ratio:7.2f} × {against}", flush=True)


def encoding(model: LocalModel, repeat: int, label: str, base: float | None = None) -> float:
    """Print how long encoding takes; the ratios are to the first resolution, or to `base`."""
    first = base
    for width, height in RESOLUTIONS:
        frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        taken = seconds(lambda frame=frame: model.encode_image(frame), repeat, model.device)  # type: ignore[misc]
        first = first or taken
        row(f"encode {width}x{height}, {label}", taken, taken / first, f"{RESOLUTIONS[0][0]}x{RESOLUTIONS[0][1]} eager")
    assert first is not None
    return first


def decoding(model: LocalModel, repeat: int) -> None:
    """Print how long a step takes beside reading the decoder's weights once."""
    encoded = model.encode_image(np.zeros((480, 640, 3), np.uint8))
    weights = [p for p in model.network.text.blocks.parameters() if p.ndim == 2]
    reading = seconds(lambda: [w.sum() for w in weights], repeat, model.device)
    for rows in ROWS:
        scheduler = model.scheduler()
        for _ in range(rows):
            scheduler.submit(Query(encoded, "?", settings=Settings(temperature=0.0, max_tokens=100_000)))
        scheduler.step()
        taken = seconds(scheduler.step, 8 * repeat, model.device)
        row(f"one decoding step of {rows} rows", taken, taken / reading, "summing the decoder's matrices")


def tiny(device: torch.device, repeat: int) -> None:
    """Print the tiny model's detection on this device beside the CPU."""
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    base = None
    for where in dict.fromkeys(("cpu", str(device))):
        with load("tiny", device=where) as model:
            taken = seconds(lambda model=model: [model.detect(frame, n) for n in NAMES], repeat, model.device)  # type: ignore[misc]
        base = base or taken
        row(f"tiny: {len(NAMES)} classes on 640x480, {where}", taken, taken / base, "CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=None, help="layers of encoder and decoder; all of them")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, on a CUDA device")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing measured.")
        return
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device), torch.__version__)
    model = random_model(arguments.layers, arguments.layers, device)
    base = encoding(model, arguments.repeat, "eager")
    decoding(model, arguments.repeat)
    if arguments.compile:
        print(f"warm-up of compile(): {model.compile():.1f} s")
        encoding(model, arguments.repeat, "compiled", base)
    if device.type == "cuda":
        print(f"memory at most: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    model.close()
    tiny(device, arguments.repeat)


if __name__ == "__main__":
    main()
