"""Times, targets and the report of `full_size.py`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "i8mm")

# Targets by measure: (must, goal)
TARGETS = {
    "encode, share of the product rate, bfloat16": (0.72, 0.80),
    "encode, share of the product rate, float32": (0.78, 0.88),
    "encode, best full precision / int8": (1.4, 1.8),
    "decode step, float32 / int8": (2.5, 4.0),
    "decode step, share of the bandwidth": (0.60, 0.75),
    "1 class, published / ours": (1.08, 1.15),
    "1 class, published / int8": (1.5, 2.0),
    "8 classes, published / ours": (1.55, 1.75),
    "8 classes, published / int8": (2.2, 3.0),
    "resident memory, int8 (GB)": (2.6, 2.2),
    "resident memory, int4 (GB)": (1.8, 1.5),
    "peak of load / weights": (1.15, 1.15),
    "tiny model, change of F1 at IoU 0.5, bfloat16": (0.02, 0.01),
    "tiny model, change of F1 at IoU 0.5, int8": (0.02, 0.01),
    "tiny model, change of F1 at IoU 0.5, int4": (0.05, 0.03),
}


@dataclass
class Times:
    """Times in seconds of each measure, one entry per round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        """Time a call and return its result."""
        start = time.perf_counter()
        result = call()
        self.values.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def __getitem__(self, name: str) -> float:
        """Return the median time of a measure."""
        return statistics.median(self.values[name])

    def ratio(self, numerator: Iterable[str], denominator: Iterable[str]) -> float:
        """Return the median over rounds of the ratio of two sums of measures."""
        sums = [[sum(times) for times in zip(*(self.values[n] for n in names), strict=True)]
                for names in (numerator, denominator)]  # fmt: skip
        return statistics.median(a / b for a, b in zip(*sums, strict=True))


class Report:
    """Prints results next to their targets and collects them for the JSON file."""

    def __init__(self) -> None:
        """Start with a description of the machine."""
        self.results: dict[str, Any] = {
            "date": str(date.today()),
            "processor": _processor(),
            "flags": _flags(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "measures": {},
        }
        described = {k: v for k, v in self.results.items() if k != "measures"}
        print(", ".join(f"{k}: {' '.join(v) if isinstance(v, list) else v}" for k, v in described.items()), flush=True)

    def add(self, name: str, value: float, note: str = "", target: str = "") -> None:
        """Print a result and its target."""
        must, goal = TARGETS.get(target or name, (None, None))
        wanted = "" if must is None else f"   must {must:g}, goal {goal:g}"
        print(f"{name:52} {value:9.3g} {note}{wanted}", flush=True)
        self.results["measures"][name] = round(value, 4)

    def save(self, path: Path) -> None:
        """Write all results as JSON. Results of other sections on the same kind of machine are kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text()) if path.exists() else {}
        if all(earlier.get(key) == self.results[key] for key in ("processor", "flags", "threads", "torch")):
            for key in ("measures", "profile"):
                self.results[key] = earlier.get(key, {}) | self.results.get(key, {})
        path.write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"wrote {path}")


def _cpu_info(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(name)), "")


def _processor() -> str:
    return _cpu_info("model name") or "unknown"


def _flags() -> list[str]:
    found = (_cpu_info("flags") or _cpu_info("features")).split()
    return [flag for flag in FLAGS if flag in found]
