"""Measure a model of the size of Moondream 2 with random weights on a GPU, in less than 8 minutes.

    python benchmarks/gpu.py                                         # all sections: 20 GB of device memory
    python benchmarks/gpu.py --sections decode request               # some of them
    python benchmarks/gpu.py --device cpu --layers 2 --repeat 1      # the same code on a CPU, as a test

Random weights in bfloat16 have the speed of the real ones. The end token is impossible, so every detection returns the
maximum number of objects. Times are compared with the limits of the device, measured in the same run. Each section
runs even if another one fails. The results are written to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
from _common import encoding_flops, forbid_end, random_model, seconds
from torch import nn

from moondream_cv.engine.crops import cut_crops
from moondream_cv.engine.cuda_graphs import GraphPool
from moondream_cv.engine.gpu_preprocessing import cut_crops_on_device
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.scheduler import Scheduler
from moondream_cv.engine.transfers import upload
from moondream_cv.model.quantization import is_quantizable, quantize_int8
from moondream_cv.model.quantized_linear import Int8Linear
from moondream_cv.requests import Detect, ErrorResult, Settings

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
PRODUCT = (2048, 4096, 4096)
COPY_BYTES = 2**30
RESOLUTIONS = {"640x480": (480, 640), "1080p": (1080, 1920)}
NUM_CLASSES = 80
OBJECTS = 3  # per class
SEQUENCES = (1, 8, 64)
STEPS = 6  # per timed call of the decode section: each head twice
DECODE_REPEAT = 3  # more calls would fill the KV cache, which makes steps longer


@dataclass(frozen=True)
class Measurement:
    """One result.

    Attributes:
        name: Name of the measure, with the settings.
        value: Number in `unit`.
        unit: Unit of the value.
        target: Target of the project, such as ">= 0.6"; empty: no target.
    """

    name: str
    value: float
    unit: str
    target: str = ""


@dataclass
class Run:
    """A run of the benchmark.

    Attributes:
        device: Device to measure.
        layers: Layers of the encoder and of the decoder; None: all.
        repeat: Timed calls per measurement.
        num_images: Images of a batch.
        measurements: Results so far.
        product_rate: FLOP per second of a bfloat16 matrix product.
        bandwidth: Bytes per second of a copy, reads and writes.
    """

    device: torch.device
    layers: int | None
    repeat: int
    num_images: int
    measurements: list[Measurement] = field(default_factory=list)
    product_rate: float = 0.0
    bandwidth: float = 0.0

    def add(self, name: str, value: float, unit: str, target: str = "") -> None:
        """Print and keep a result."""
        self.measurements.append(Measurement(name, value, unit, target))
        print(f"  {name:62} {value:10.3f} {unit:12} {target and f'target {target}'}", flush=True)

    def time(self, call: Callable[[], object]) -> float:
        """Return the median time of a call in seconds."""
        return seconds(call, self.repeat, self.device)

    def model(self) -> LocalModel:
        """Return a model whose lists of objects do not end by themselves."""
        model = random_model(self.layers, self.layers, self.device)
        forbid_end(model.network)
        return model


def frame(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return an RGB array of noise."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def measure_limits(run: Run) -> None:
    """Measure the rate of matrix products and of copies."""
    m, n, k = PRODUCT
    a = torch.randn(m, k, device=run.device, dtype=torch.bfloat16)
    b = torch.randn(k, n, device=run.device, dtype=torch.bfloat16)
    run.product_rate = 10 * 2 * m * n * k / run.time(lambda: [a @ b for _ in range(10)])
    source = torch.zeros(COPY_BYTES, device=run.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    run.bandwidth = 2 * COPY_BYTES / run.time(lambda: target.copy_(source))
    run.add(f"product {list(PRODUCT)}, bfloat16", run.product_rate / 1e12, "TFLOP/s")
    run.add("copy, reads and writes", run.bandwidth / 1e9, "GB/s")


def measure_encoding(run: Run) -> None:
    """Measure image encoding with weights in bfloat16 and int8."""
    model = run.model()
    _encode(run, model, "bfloat16", ">= 0.6")
    _detect_images(run, model, "bfloat16", ">= 60")
    quantize(model.network)
    _encode(run, model, "int8", "")
    _detect_images(run, model, "int8", ">= 100")


def _encode(run: Run, model: LocalModel, mode: str, target: str) -> None:
    for name, size in RESOLUTIONS.items():
        flop = count_flop(model, frame(size))
        for count in sorted({1, run.num_images}):
            frames = [frame(size, seed) for seed in range(count)]
            taken = run.time(lambda frames=frames: model.encode_arrays(frames, None, None))  # type: ignore[misc]
            label = f"encode {name}, {mode}, batch of {count}"
            run.add(label, count / taken, "images/s")
            if mode == "bfloat16":
                share = count * flop / taken / run.product_rate
                run.add(f"{label}: share of the product rate", share, "", target)


def count_flop(model: LocalModel, rgb: np.ndarray) -> float:
    """Return the floating-point operations of encoding an image."""
    return encoding_flops(model.config, len(cut_crops(rgb, model.config.vision).pixels))


def _detect_images(run: Run, model: LocalModel, mode: str, target: str) -> None:
    requests = [
        Detect(frame(RESOLUTIONS["1080p"], seed), "dog", Settings(max_objects=OBJECTS))
        for seed in range(2 * run.num_images)
    ]
    taken = run.time(lambda: detect(model, requests))
    run.add(f"detect 1 class, 1080p, {mode}, {len(requests)} images", len(requests) / taken, "images/s", target)


def detect(model: LocalModel, requests: Sequence[Detect]) -> None:
    """Run requests.

    Raises:
        Exception: A request failed.
    """
    for result in model.run(requests):
        if isinstance(result, ErrorResult):
            raise result.error


def quantize(network: nn.Module) -> None:
    """Replace the linear layers of a network by layers with 8-bit weights."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantizable(f"{name}.weight", layer.weight.shape):
            network.set_submodule(name, Int8Linear(*quantize_int8(layer.weight), layer.bias))


def measure_requests(run: Run) -> None:
    """Measure the latency of one request and of many classes on one frame."""
    model, settings = run.model(), Settings(max_objects=OBJECTS)
    for name, size in RESOLUTIONS.items():
        requests = [Detect(frame(size), "dog", settings)]
        taken = run.time(lambda requests=requests: detect(model, requests))  # type: ignore[misc]
        target = "<= 25" if name == "640x480" else ""
        run.add(f"1 class with {OBJECTS} objects on a new {name} frame", 1000 * taken, "ms", target)
        requests = [Detect(requests[0].image, f"class {i}", settings) for i in range(NUM_CLASSES)]
        taken = run.time(lambda requests=requests: detect(model, requests))  # type: ignore[misc]
        target = "<= 150" if name == "640x480" else ""
        run.add(f"{NUM_CLASSES} classes with {OBJECTS} objects each on one {name} frame", 1000 * taken, "ms", target)


def measure_decoding(run: Run) -> None:
    """Measure decode steps with dynamic shapes, and with static shapes and CUDA graphs."""
    model = run.model()
    encoded = model.encode_image(frame(RESOLUTIONS["640x480"]))
    weights = sum(parameter.nbytes for parameter in model.network.text.blocks.parameters())
    bytes_read = weights + encoded.prefix.nbytes
    for mode, pool in (("eager", None), ("graph", GraphPool(model.network, 2**32))):
        model.graph_pool = pool
        for count in SEQUENCES:
            scheduler = model.scheduler()
            for i in range(count):
                scheduler.submit(Detect(encoded, f"class {i}", Settings(max_objects=10_000)))
            for _ in range(2):
                scheduler.step()
            steps = functools.partial(run_steps, scheduler)
            taken = seconds(steps, min(run.repeat, DECODE_REPEAT), run.device) / STEPS
            target = ">= 0.6" if mode == "graph" else ""
            run.add(f"decode step, {mode}, {count} sequences", 1000 * taken, "ms")
            run.add(
                f"decode step, {mode}, {count} sequences: share of the bandwidth",
                bytes_read / taken / run.bandwidth,
                "",
                target,
            )


def run_steps(scheduler: Scheduler) -> None:
    """Run the steps of one timed call."""
    for _ in range(STEPS):
        scheduler.step()


def measure_preprocessing(run: Run) -> None:
    """Measure cutting frames into crops by Pillow and on the device."""
    config = run.model().config.vision
    for name, size in RESOLUTIONS.items():
        rgb = frame(size)
        with_pillow = run.time(lambda rgb=rgb: cut_crops(rgb, config))  # type: ignore[misc]
        on_device = run.time(lambda rgb=rgb: cut_crops_on_device(upload(rgb, run.device), config))  # type: ignore[misc]
        pixels, _ = cut_crops_on_device(upload(rgb, run.device), config)
        difference = np.abs(pixels.cpu().numpy().astype(int) - cut_crops(rgb, config).pixels).max()
        run.add(f"crops of a {name} frame, Pillow on one core", 1000 * with_pillow, "ms")
        run.add(f"crops of a {name} frame, {run.device.type}", 1000 * on_device, "ms")
        run.add(f"crops of a {name} frame: largest difference", float(difference), "gray levels", "<= 1")


def measure_compiled(run: Run) -> None:
    """Measure `LocalModel.compile` and the compiled encoder."""
    model, rgb = run.model(), frame(RESOLUTIONS["640x480"])
    flop = count_flop(model, rgb)
    taken = model.compile() if run.device.type == "cuda" else model._compile_encoder(backend="eager")
    run.add("warm-up of compile()", taken, "s")
    taken = run.time(lambda: model.encode_image(rgb))
    run.add("encode 640x480, compiled: share of the product rate", flop / taken / run.product_rate, "", ">= 0.6")


SECTIONS: dict[str, Callable[[Run], None]] = {
    "encode": measure_encoding,
    "request": measure_requests,
    "decode": measure_decoding,
    "preprocess": measure_preprocessing,
    "compile": measure_compiled,
}


def run_sections(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Run sections after the limits of the device.

    Args:
        run: Receives the results.
        names: Sections to run.

    Returns:
        Tracebacks of the sections that failed, by name.
    """
    failed = {}
    for name, section in {"limits": measure_limits, **{name: SECTIONS[name] for name in names}}.items():
        print(f"{name}:", flush=True)
        try:
            section(run)
        except Exception:  # the other sections must run
            failed[name] = traceback.format_exc()
            print(failed[name], flush=True)
        if run.device.type == "cuda":
            run.add(f"peak memory of {name}", torch.cuda.max_memory_allocated(run.device) / 1e9, "GB")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)
    if run.device.type != "cuda":
        run.add("peak memory of the process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB")
    return failed


def main() -> None:
    """Parse the arguments, run the sections and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device, such as cuda:1 or cpu (default: cuda)")
    parser.add_argument("--layers", type=int, default=None, help="layers of the encoder and the decoder (default: all)")
    parser.add_argument("--repeat", type=int, default=10, help="calls per measurement (default: 10)")
    parser.add_argument("--images", type=int, default=8, help="images per batch (default: 8)")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (default: all)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing measured.")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(name, torch.__version__, date.today())
    run = Run(device, arguments.layers, arguments.repeat, arguments.images)
    failed = run_sections(run, arguments.sections)
    report = {
        "device": name,
        "torch": torch.__version__,
        "date": str(date.today()),
        "layers": arguments.layers,
        "measurements": [asdict(measurement) for measurement in run.measurements],
        "failed": failed,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {arguments.output}")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
