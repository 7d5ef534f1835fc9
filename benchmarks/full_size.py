"""Measure a model of the size of Moondream 2 with random weights on a CPU: speed, memory and accuracy of every mode.

    python benchmarks/full_size.py                                    # the best modes of this processor
    python benchmarks/full_size.py --reference PATH/TO/moondream      # and the published implementation
    python benchmarks/full_size.py --memory --accuracy --hub          # and memory, drift and a download
    python benchmarks/full_size.py --layers 1 --repeat 1              # the same code in a minute, as a test

Nothing is downloaded: random weights in the published layout have the speed and size of the real ones. The end token is
impossible, so every detection returns 3 objects. The published implementation (a checkout of
github.com/vikhyat/moondream, 2025-06) runs on the same weights with the same number of threads. All models alternate
within one run. Times are compared as ratios, and with the limits of the machine, which are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import empty_network, encoding_flops, forbid_end
from _report import Report, Times
from PIL import Image
from torch.nn import functional as F

from moondream_cv import Detect, Query, Settings, load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.evaluation.scenes import evaluate_scenes, held_out_scenes
from moondream_cv.model import layers
from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.model.hardware import probe_cpu
from moondream_cv.model.quantized_linear import weight_bytes
from moondream_cv.model.text import prefix_mask
from moondream_cv.training.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
CLASSES = ("person", "dog", "car", "bus", "red circle", "star", "traffic light", "cup")
OBJECTS = 3  # per class
SETTINGS = Settings(max_objects=OBJECTS)
GB = 1e9


# --- The checkpoint ---------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, layers: int | None) -> None:
    """Write random weights in bfloat16 with the sizes of Moondream 2B, in the published layout.

    Args:
        folder: Folder to write.
        layers: Number of layers of the encoder and the decoder; None: all.
    """
    network = empty_network(layers, layers, torch.device("cpu"))
    network.initialize(torch.Generator().manual_seed(0))
    forbid_end(network)
    save_checkpoint(network, network.config, build_tokenizer(), folder)


# --- Times ------------------------------------------------------------------------------------------------------------


def measure_limits(times: Times, dtype: torch.dtype, repeat: int = 5) -> None:
    """Time a large product and a matrix-vector product, the limits of encoding and of decoding.

    Both are measured with `F.linear` and with the fastest of the kernels that this package uses.

    Args:
        times: Receives the best time of each, as a round.
        dtype: Data type of the matrices.
        repeat: Number of calls.
    """
    name = str(dtype).removeprefix("torch.")
    for label, rows, (out, width) in (("product", 2048, (4096, 4096)), ("vector", 1, (24576, 8192))):
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
        calls: dict[str, Callable[[], Any]] = {"F.linear": lambda x=x, weight=weight: F.linear(x, weight)}
        with torch.inference_mode():
            if layers.can_use_onednn(x):
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                for kernel, matrix in (("plain", weight), ("packed", packed)):
                    calls[kernel] = lambda x=x, matrix=matrix: layers.onednn_linear(x, matrix, None)
            best = Times()
            for _ in range(repeat):
                for kernel, call in calls.items():
                    best.measure(kernel, call)
        fastest = min(min(values) for values in best.values.values())
        times.values.setdefault(f"{label} {name}", []).append(min(best.values["F.linear"]))
        times.values.setdefault(f"fastest {label} {name}", []).append(fastest)


def product_rate(times: Times, dtype: str, fastest: bool = False) -> float:
    """Return the measured FLOP/s of a large product, with `F.linear` or with the fastest kernel."""
    return 2 * 2048 * 4096 * 4096 / times[f"{'fastest ' * fastest}product {dtype}"]


def bandwidth(times: Times, dtype: str, fastest: bool = False) -> float:
    """Return the measured bytes/s of a matrix-vector product, with `F.linear` or with the fastest kernel."""
    return 24576 * 8192 * getattr(torch, dtype).itemsize / times[f"{'fastest ' * fastest}vector {dtype}"]


def decode_bytes(model: LocalModel) -> float:
    """Return the bytes that a decode step reads: blocks, language head, keys and values of the image."""
    text = model.network.text
    weights = sum(weight_bytes(module) for module in (text.blocks, text.lm_head))
    return weights + prefix_bytes(model)


def prefix_bytes(model: LocalModel) -> int:
    """Return the size of the keys and values of one image."""
    text = model.config.text
    return 2 * model.config.prefix_length * text.n_layers * text.n_kv_heads * text.head_dim * model.dtype.itemsize


# --- Models -----------------------------------------------------------------------------------------------------------


class Ours:
    """One mode of this package."""

    def __init__(self, name: str, folder: Path, frame: np.ndarray) -> None:
        """Load a model."""
        self.name, self.frame = name, frame
        self.model = load(folder, device="cpu", **MODES[name])  # type: ignore[arg-type]
        self.model.show_progress = False

    def measure(self, times: Times) -> None:
        """Time all stages once."""
        encoded = times.measure(f"{self.name} encode", lambda: self.model.encode_image(self.frame))
        requests = [Detect(encoded, name, SETTINGS) for name in CLASSES]
        times.measure(f"{self.name} 1 class", lambda: self._detect(requests[:1]))
        times.measure(f"{self.name} 8 classes", lambda: self._detect(requests))
        for batch_size in (1, 8):
            times.values.setdefault(f"{self.name} step {batch_size}", []).append(self._step(encoded, batch_size))
        if self.name == "float32":
            with _without_onednn():
                times.values.setdefault("float32 step, F.linear", []).append(self._step(encoded, 1))

    def _step(self, encoded: Any, batch_size: int) -> float:
        """Return the median time of a decode step."""
        scheduler = self.model.scheduler()
        for _ in range(batch_size):
            scheduler.submit(Query(encoded, "?", settings=Settings(temperature=0.0, max_tokens=10_000)))
        scheduler.step()
        steps = Times()
        for _ in range(6):
            steps.measure("step", scheduler.step)
        return steps["step"]

    def _detect(self, requests: list[Detect]) -> None:
        for result in self.model.run(requests):
            assert len(result.objects) == OBJECTS, result  # type: ignore[union-attr]


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Use `F.linear`, as without this package's choice of kernels."""
    before, layers._HAS_ONEDNN = layers._HAS_ONEDNN, False
    try:
        yield
    finally:
        layers._HAS_ONEDNN = before


class Published:
    """The published implementation, with the weights of a model of this package."""

    name = "published"

    def __init__(self, folder: Path, model: LocalModel, frame: np.ndarray) -> None:
        """Import the checkout and share the weights."""
        sys.path.insert(0, str(folder))
        from moondream.torch import moondream as module  # type: ignore[import-not-found]
        from moondream.torch.config import MoondreamConfig as PublishedConfig  # type: ignore[import-not-found]

        class LocalTokenizer:
            @staticmethod
            def from_pretrained(_: str) -> Any:
                return model.tokenizer

        module.Tokenizer = LocalTokenizer
        self.dtype = model.dtype
        self.model = module.MoondreamModel(PublishedConfig.from_dict(model.config.to_dict()), dtype=model.dtype)
        missing, unexpected = self.model.load_state_dict(model.network.state_dict(), strict=False, assign=True)
        if unexpected or [key for key in missing if "cache" not in key]:
            raise SystemExit(f"the weights do not fit the reference: missing {missing}, unexpected {unexpected}")
        self.image = Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))

    def measure(self, times: Times) -> None:
        """Time image encoding, 1 class, and 8 classes one after another on the encoded image."""
        encoded = times.measure("published encode", lambda: self.model.encode_image(self.image))
        times.measure("published 1 class", lambda: self._detect(encoded, CLASSES[:1]))
        times.measure("published 8 classes", lambda: self._detect(encoded, CLASSES))

    def _detect(self, encoded: Any, names: Iterable[str]) -> None:
        for name in names:
            found = self.model.detect(encoded, name, settings={"max_objects": OBJECTS})
            assert len(found["objects"]) == OBJECTS


# --- Sections ---------------------------------------------------------------------------------------------------------


def measure_speed(folder: Path, modes: list[str], reference: Path | None, repeat: int, report: Report) -> None:
    """Time all modes and the published implementation, alternating."""
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    full = [mode for mode in modes if "dtype" in MODES[mode]]
    best = "bfloat16" if "bfloat16" in full and probe_cpu().has_bfloat16 else (full or modes)[0]

    # Load
    runners: list[Ours | Published] = []
    times = Times()
    for mode in modes:
        runners.append(times.measure(f"{mode} load", lambda mode=mode: Ours(mode, folder, frame)))
    ours = {runner.name: runner for runner in runners if isinstance(runner, Ours)}
    if reference is not None:
        runners.append(Published(reference, ours[best].model, frame))

    # Measure all stages of all models, alternating
    for round_number in range(repeat + 1):
        for dtype in full or ["float32"]:
            measure_limits(times, getattr(torch, dtype))
        for runner in runners:
            runner.measure(times)
        if not round_number:  # warm-up
            times.values = {k: v for k, v in times.values.items() if k.endswith(" load")}
        print(f"round {round_number} of {repeat} done", file=sys.stderr, flush=True)

    # Report limits, shares and ratios
    num_crops = len(ours[best].model.encode_image(frame).crops)
    flops = encoding_flops(ours[best].model.config, num_crops)
    for dtype in full:
        for fastest, kernel in ((False, "F.linear"), (True, "fastest kernel")):
            report.add(f"product rate, {dtype}, {kernel} (GFLOP/s)", product_rate(times, dtype, fastest) / 1e9)
            report.add(f"bandwidth, {dtype}, {kernel} (GB/s)", bandwidth(times, dtype, fastest) / GB)
    for mode, runner in ours.items():
        dtype = str(runner.model.dtype).removeprefix("torch.")
        encode = times[f"{mode} encode"]
        report.add(f"{mode}: load (s)", times[f"{mode} load"])
        report.add(f"{mode}: encode 640x480 (s)", encode)
        report.add(f"{mode}: images/s, 1 class of 3 objects", 1 / (encode + times[f"{mode} 1 class"]))
        report.add(f"{mode}: images/s, 8 classes of 3 objects", 1 / (encode + times[f"{mode} 8 classes"]))
        report.add(f"{mode}: tokens/s, batch of 1", 1 / times[f"{mode} step 1"])
        report.add(f"{mode}: tokens/s, batch of 8", 8 / times[f"{mode} step 8"])
        report.add(f"{mode}: decode step, 8 sequences / 1", times.ratio([f"{mode} step 8"], [f"{mode} step 1"]))
        if mode in full:
            for fastest, limit in ((False, ""), (True, ", fastest kernel")):
                rate = product_rate(times, dtype, fastest)
                report.add(f"encode, share of the product rate{limit}, {mode}", flops / encode / rate)
                name = f"decode step, share of the bandwidth{limit}"
                achieved = decode_bytes(runner.model) / times[f"{mode} step 1"]
                report.add(f"{name}, {mode}", achieved / bandwidth(times, dtype, fastest), target=name)
    for mode in ours:
        if mode in full or not full:
            continue
        note = f"({best})"
        report.add(f"encode, best full precision / {mode}", times.ratio([f"{best} encode"], [f"{mode} encode"]), note)
        if "float32" in ours:
            report.add(f"decode step, float32 / {mode}", times.ratio(["float32 step 1"], [f"{mode} step 1"]))
            name, baseline = f"decode step, float32 with F.linear / {mode}", "float32 step, F.linear"
            report.add(name, times.ratio([baseline], [f"{mode} step 1"]), target=f"decode step, float32 / {mode}")
    if reference is None:
        return
    dtype, encode = best, times["published encode"]
    report.add("published: encode 640x480 (s)", encode, f"({dtype})")
    report.add(
        "published: encode, share of the product rate", flops / encode / product_rate(times, dtype), f"({dtype})"
    )
    for classes in ("1 class", "8 classes"):
        theirs = ["published encode", f"published {classes}"]
        for mode in ours:
            label = "ours" if mode == best else mode
            report.add(
                f"{classes}, published / {label}",
                times.ratio(theirs, [f"{mode} encode", f"{mode} {classes}"]),
                f"({dtype})",
            )


def measure_controls(folder: Path, mode: str, repeat: int, report: Report) -> None:
    """Time image encoding with fewer crops and with an earlier frame, relative to the default."""
    runner = Ours(mode, folder, np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    model, frame = runner.model, runner.frame
    previous = model.encode_image(frame)
    moved = frame.copy()
    moved[:40, :40] = 0  # changes the global crop and one local crop
    calls: dict[str, Callable[[], Any]] = {
        f"max_crops={limit}": lambda limit=limit: model.encode_image(frame, {"max_crops": limit})
        for limit in (6, 4, 2, 1)
    }
    calls["previous=, one object moved"] = lambda: model.encode_image(moved, previous=previous)
    calls["previous=, no change"] = lambda: model.encode_image(frame, previous=previous)
    times = Times()
    for _ in range(repeat):
        times.measure("default", lambda: model.encode_image(frame))
        for name, call in calls.items():
            times.measure(name, call)
    for name in calls:
        report.add(f"{mode}: encode 640x480, {name} / default", times.ratio([name], ["default"]))


def profile(folder: Path, mode: str, report: Report) -> None:
    """Print the operators in which encoding and decoding spend their time."""
    runner = Ours(mode, folder, np.zeros((480, 640, 3), np.uint8))
    model = runner.model
    encoded = model.encode_image(runner.frame)
    for stage, call in (
        ("encode", lambda: model.encode_image(runner.frame)),
        ("detect 8 classes", lambda: model.run([Detect(encoded, name, SETTINGS) for name in CLASSES])),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            call()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        shares = {event.key: event.self_cpu_time_total / total for event in events[:8]}
        for name, share in shares.items():
            print(f"{mode}, {stage}: {name:45} {share:6.1%}", flush=True)
        report.results.setdefault("profile", {})[f"{mode}, {stage}"] = {k: round(v, 4) for k, v in shares.items()}


def measure_memory(folder: Path, modes: list[str], report: Report) -> None:
    """Measure the memory of `load` in a new process for each mode."""
    for mode in modes:
        command = [sys.executable, __file__, "--weights", str(folder), "--measure-load", mode]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        report.add(f"{mode}: weights (GB)", found["weights"] / GB)
        name = f"resident memory, {mode} (GB)"
        report.add(name, found["resident"] / GB, "after load, with the interpreter")
        peak = (found["peak"] - found["before"]) / found["weights"]
        report.add(f"{mode}: peak of load / weights", peak, target="peak of load / weights")
        report.add(f"{mode}: image prefix (MB)", found["prefix"] / 1e6)


def print_memory(folder: Path, mode: str) -> None:
    """Load a model and print its memory as JSON. Runs in a new process."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    model = load(folder, device="cpu", **MODES[mode])  # type: ignore[arg-type]
    found = {
        "before": before,
        "peak": _status("VmHWM"),
        "resident": _status("VmRSS"),
        "weights": weight_bytes(model.network),
        "prefix": prefix_bytes(model),
    }
    print(json.dumps(found))


def measure_accuracy(folder: Path, modes: list[str], scenes: int, report: Report) -> None:
    """Compare each mode with float32, on the tiny model and on the random weights."""
    # Tiny model: metrics on held-out scenes
    base: dict[str, float] = {}
    for mode in dict.fromkeys(("float32", *modes)):
        with load("tiny", device="cpu", **MODES[mode]) as tiny:  # type: ignore[arg-type]
            metrics = evaluate_scenes(tiny, held_out_scenes("own", scenes)).metrics()
        for name in ("F1 at IoU 0.5", "mean IoU of matches", "count"):
            value = metrics[name]
            base.setdefault(name, value)
            report.add(f"tiny model, {name}, {mode}", value)
            if mode != "float32":
                report.add(f"tiny model, change of {name}, {mode}", value - base[name])

    # Random weights: arg-max choices after the same tokens
    frame = np.random.default_rng(1).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    expected: torch.Tensor | None = None
    for mode in dict.fromkeys(("float32", *modes)):
        with load(folder, device="cpu", **MODES[mode]) as model:  # type: ignore[arg-type]
            model.show_progress = False
            choices = arg_max_choices(model, frame)
        if expected is None:
            expected = choices
        else:
            report.add(f"random weights, equal arg-max choices, {mode}", float((choices == expected).float().mean()))


@torch.inference_mode()
def arg_max_choices(model: LocalModel, frame: np.ndarray, num_tokens: int = 64) -> torch.Tensor:
    """Return the choices of all heads behind each of a fixed series of tokens that follow an image.

    Args:
        model: Model in any mode.
        frame: [H, W, 3] uint8 BGR.
        num_tokens: Number of tokens.

    Returns:
        [num_tokens, 4] token, coordinate, width and height.
    """
    network, prefix = model.network, model.config.prefix_length
    tokens = torch.randint(0, 1000, (num_tokens,), generator=torch.Generator().manual_seed(0))
    bos = network.text.embed(torch.tensor([model.config.tokenizer.bos_id]))
    embeddings = torch.cat((bos, model.encode_image(frame).embedding, network.text.embed(tokens)))
    length = len(embeddings)
    hidden = network.text(embeddings[None], torch.arange(length)[None], prefix_mask(length, prefix))[0, prefix:]
    sizes = network.region.decode_size(hidden).argmax(-1)
    return torch.cat(
        (
            network.text.logits(hidden).argmax(-1, keepdim=True),
            network.region.decode_coordinate(hidden).argmax(-1, keepdim=True),
            sizes,
        ),
        1,
    )


def measure_hub(folder: Path, report: Report) -> None:
    """Serve the checkpoint from a local hub; time `download` and the first detection, each in a new process."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.hub import Hub

    names = ("config.json", "tokenizer.json", "model.safetensors")
    frame = "numpy.zeros((480, 640, 3), numpy.uint8)"
    detect = f"import numpy, moondream_cv; moondream_cv.Detector('local/random@main')({frame}, 'dog')"
    with Hub() as hub, tempfile.TemporaryDirectory() as cache:
        hub.add("local/random", {name: (folder / name).read_bytes() for name in names})
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "MOONDREAM_CV_PROGRESS": "0"}
        for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            environment.pop(proxy, None)
        times = Times()
        for label, command in (
            ("download", [sys.executable, "-m", "moondream_cv", "download", "local/random@main"]),
            ("first detection", [sys.executable, "-c", detect]),
        ):
            times.measure(label, lambda command=command: subprocess.run(command, check=True, env=environment))
            report.add(f"hub: {label} (s)", times[label])


# --- Machine ----------------------------------------------------------------------------------------------------------


def _status(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def _checkpoint(folder: Path | None, layers: int | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        path = folder or Path(temporary)
        if not (path / "config.json").exists():
            write_checkpoint(path, layers)
        yield path


def main() -> None:
    """Parse the arguments and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    best = "bfloat16" if probe_cpu().has_bfloat16 else "float32"
    parser.add_argument(
        "--weights", type=Path, help="folder of the checkpoint, written if it is empty (default: temporary)"
    )
    parser.add_argument("--layers", type=int, help="layers of the encoder and decoder of new weights (default: all)")
    parser.add_argument("--modes", default=f"{best},int8", help=f"of {','.join(MODES)} (default: {best},int8)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds after a warm-up round (default: 3)")
    parser.add_argument("--reference", type=Path, help="checkout of the published implementation")
    parser.add_argument("--no-speed", action="store_true", help="skip the times")
    parser.add_argument("--controls", action="store_true", help="measure the effect of max_crops and previous=")
    parser.add_argument("--profile", action="store_true", help="show the operators that take the most time")
    parser.add_argument("--memory", action="store_true", help="measure the memory of load in each mode (Linux)")
    parser.add_argument("--accuracy", action="store_true", help="compare each mode with float32")
    parser.add_argument(
        "--scenes", type=int, default=200, help="scenes for the accuracy of the tiny model (default: 200)"
    )
    parser.add_argument("--hub", action="store_true", help="time a download from a local hub and the first detection")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the results, in benchmarks/results/")
    parser.add_argument("--measure-load", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    modes = arguments.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        parser.error(f"unknown modes: {', '.join(unknown)}")
    for name in ("layers", "repeat", "scenes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.reference and not (arguments.reference / "moondream" / "torch").is_dir():
        parser.error(f"--reference must be a checkout with the folder moondream/torch, got {arguments.reference}")
    if arguments.reference and (arguments.layers or not any("dtype" in MODES[mode] for mode in modes)):
        parser.error("--reference needs all layers and a mode in full precision")
    if arguments.measure_load:
        print_memory(arguments.weights, arguments.measure_load)
        return
    report = Report()
    with _checkpoint(arguments.weights, arguments.layers) as folder:
        if arguments.memory:
            measure_memory(folder, modes, report)
        if not arguments.no_speed:
            measure_speed(folder, modes, arguments.reference, arguments.repeat, report)
        if arguments.controls:
            measure_controls(folder, modes[0], arguments.repeat, report)
        if arguments.profile:
            for mode in modes:
                profile(folder, mode, report)
        if arguments.accuracy:
            measure_accuracy(folder, modes, arguments.scenes, report)
        if arguments.hub:
            measure_hub(folder, report)
    if arguments.output:
        report.save(arguments.output)


if __name__ == "__main__":
    main()
