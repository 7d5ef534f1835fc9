"""Measure the full-size model (random weights) and the tiny model on a GPU, as ratios within one run.

    python benchmarks/gpu.py                    # dimensions of Moondream 2B in bfloat16: 3.7 GB of device memory
    python benchmarks/gpu.py --device cpu --layers 2 --repeat 2      # the same code on a CPU, as a test

Image encoding is compared across resolutions and with `torch.compile`, a decode step with reading the weights once, and
the tiny model with the CPU. Random weights have the speed of real ones.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from _common import random_model, seconds

from moondream_cv import Query, Settings, load
from moondream_cv.engine.local_model import LocalModel

RESOLUTIONS = ((640, 480), (1920, 1080))
BATCH_SIZES = (1, 8, 64)
NAMES = ("dog", "red circle", "star", "bus")


def print_row(name: str, seconds: float, ratio: float, baseline: str) -> None:
    """Print a time in ms and its ratio to a baseline."""
    print(f"{name:44} {1000 * seconds:10.2f} ms   {ratio:7.2f} × {baseline}", flush=True)


def measure_encoding(model: LocalModel, repeat: int, label: str, base: float | None = None) -> float:
    """Print the time of image encoding at each resolution.

    Args:
        model: Model to measure.
        repeat: Number of timed calls.
        label: Execution mode, "eager" or "compiled".
        base: Time in seconds that the ratios refer to; None: the time at the first resolution.

    Returns:
        The time in seconds that the ratios refer to.
    """
    first = base
    for width, height in RESOLUTIONS:
        frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        taken = seconds(lambda frame=frame: model.encode_image(frame), repeat, model.device)  # type: ignore[misc]
        first = first or taken
        print_row(
            f"encode {width}x{height}, {label}", taken, taken / first, f"{RESOLUTIONS[0][0]}x{RESOLUTIONS[0][1]} eager"
        )
    assert first is not None
    return first


def measure_decoding(model: LocalModel, repeat: int) -> None:
    """Print the time of a decode step, and its ratio to reading the decoder's weights once."""
    encoded = model.encode_image(np.zeros((480, 640, 3), np.uint8))
    weights = [p for p in model.network.text.blocks.parameters() if p.ndim == 2]
    reading = seconds(lambda: [w.sum() for w in weights], repeat, model.device)
    for batch_size in BATCH_SIZES:
        scheduler = model.scheduler()
        for _ in range(batch_size):
            scheduler.submit(Query(encoded, "?", settings=Settings(temperature=0.0, max_tokens=100_000)))
        scheduler.step()
        taken = seconds(scheduler.step, 8 * repeat, model.device)
        print_row(f"decode step, batch of {batch_size}", taken, taken / reading, "summing the decoder's matrices")


def measure_tiny(device: torch.device, repeat: int) -> None:
    """Print the detection time of the tiny model on the CPU and on a device."""
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    base = None
    for name in dict.fromkeys(("cpu", str(device))):
        with load("tiny", device=name) as model:
            taken = seconds(lambda model=model: [model.detect(frame, n) for n in NAMES], repeat, model.device)  # type: ignore[misc]
        base = base or taken
        print_row(f"tiny: {len(NAMES)} classes on 640x480, {name}", taken, taken / base, "CPU")


def main() -> None:
    """Parse the arguments and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device, such as cuda:1 or cpu (default: cuda)")
    parser.add_argument("--layers", type=int, default=None, help="layers of the encoder and the decoder (default: all)")
    parser.add_argument("--repeat", type=int, default=10, help="calls per measurement (default: 10)")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile; requires a CUDA device")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing measured.")
        return
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device), torch.__version__)
    model = random_model(arguments.layers, arguments.layers, device)
    base = measure_encoding(model, arguments.repeat, "eager")
    measure_decoding(model, arguments.repeat)
    if arguments.compile:
        print(f"warm-up of compile(): {model.compile():.1f} s")
        measure_encoding(model, arguments.repeat, "compiled", base)
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    model.close()
    measure_tiny(device, arguments.repeat)


if __name__ == "__main__":
    main()
