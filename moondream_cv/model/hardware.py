"""Facts about the CPU and the memory of this machine, and the choice of a data type from them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_LIMITED = 2**60  # larger limits of control groups mean that there is no limit
_SMALL_WIDTH = 512  # decoders up to this width run in float32
_LOADING_SHARE = 1.15  # peak memory of loading, as a multiple of the weights


@dataclass(frozen=True)
class Cpu:
    """Facts about the CPU that this process may use.

    Attributes:
        has_bfloat16: Whether oneDNN multiplies bfloat16 matrices in hardware; otherwise they are emulated slowly.
        free_memory: Memory that this process can allocate, in bytes; None: unknown.
        usable_cores: Cores that this process may use, after CPU affinity and the quota of its control group.
        cores: Cores of the machine.
        threads: Threads that PyTorch uses.
    """

    has_bfloat16: bool
    free_memory: int | None
    usable_cores: int
    cores: int
    threads: int


@dataclass(frozen=True)
class Precision:
    """Data type and quantization of a model.

    Attributes:
        dtype: Data type of the activations and of weights in full precision.
        quantize: "int8" or "int4"; None: as in the checkpoint.
        warning: Reason for a quantization that was not requested; None: no reason.
    """

    dtype: torch.dtype
    quantize: str | None = None
    warning: str | None = None


def probe_cpu() -> Cpu:
    """Return the facts about the CPU and the free memory of this machine."""
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Cpu(
        has_bfloat16=_has_bfloat16(),
        free_memory=free_memory(),
        usable_cores=min(affinity, cpu_quota() or affinity),
        cores=cores,
        threads=torch.get_num_threads(),
    )


def is_small(width: int) -> bool:
    """Return whether a model is so small that it runs in float32 and that its speed does not matter.

    Args:
        width: Width of the decoder.
    """
    return width <= _SMALL_WIDTH


def cpu_dtype(width: int, cpu: Cpu) -> torch.dtype:
    """Return the fastest data type of a model on a CPU; small models run in float32.

    Args:
        width: Width of the decoder.
        cpu: Facts about the CPU.
    """
    return torch.bfloat16 if cpu.has_bfloat16 and not is_small(width) else torch.float32


def choose_precision(width: int, values: int, cpu: Cpu) -> Precision:
    """Choose the data type of a model on a CPU, and quantization if its weights do not fit into memory.

    Args:
        width: Width of the decoder.
        values: Number of weights.
        cpu: Facts about the CPU.
    """
    chosen = cpu_dtype(width, cpu)
    needed = int(values * chosen.itemsize * _LOADING_SHARE)
    if is_small(width) or cpu.free_memory is None or needed <= cpu.free_memory:
        return Precision(chosen)
    name = str(chosen).removeprefix("torch.")
    warning = (
        f"the weights are quantized to int8, because loading them in {name} takes {gigabytes(needed)} and "
        f"{gigabytes(cpu.free_memory)} are free; dtype={name!r} loads them in full precision"
    )
    return Precision(chosen, "int8", warning)


def thread_warning(cpu: Cpu) -> str | None:
    """Return a warning if the number of threads does not fit the number of cores; None if it does.

    By default, PyTorch starts one thread per physical core, which is half of the logical cores of many CPUs.

    Args:
        cpu: Facts about the CPU.
    """
    usable = f"this process may use {cpu.usable_cores} of {cpu.cores} cores"
    if cpu.threads > cpu.usable_cores:
        return f"PyTorch runs {cpu.threads} threads, but {usable}; set OMP_NUM_THREADS={cpu.usable_cores}"
    if 2 * cpu.threads < cpu.usable_cores:
        threads = f"{cpu.threads} thread{'s' if cpu.threads > 1 else ''}"
        return f"PyTorch runs only {threads}, although {usable}; set OMP_NUM_THREADS={cpu.usable_cores}"
    return None


def gigabytes(count: int) -> str:
    """Return a number of bytes as text in GB, or in MB below 1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def free_memory() -> int | None:
    """Return the memory that this process can allocate, in bytes, within the limits of its control groups.

    Returns:
        None: the operating system does not provide it.
    """
    found = [_available_memory(), *(_free_in_group(folder) for folder in _control_groups("memory"))]
    return min((count for count in found if count is not None), default=None)


def cpu_quota() -> int | None:
    """Return the CPU quota of the control group in cores, rounded up; None: no quota."""
    quotas = []
    for folder in _control_groups("cpu"):
        text = _read(folder / "cpu.max")
        if text is None:
            text = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(max(1, -(-int(quota) // int(period))))
    return min(quotas, default=None)


def has_onednn_kernels() -> bool:
    """Return whether oneDNN has fast kernels for this CPU. On processors other than x86, it may use reference code."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@functools.cache
def supports_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 matrices on this CPU, in hardware or emulated."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _has_bfloat16() -> bool:
    if not supports_bfloat16():
        return False
    # oneDNN supports bfloat16 on every CPU with AVX-512, but emulates it without these instructions.
    capabilities: Callable[[], dict[str, object]] | None = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return any(bool(value) for name, value in capabilities().items() if name.endswith("bf16"))


def _available_memory() -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")) or "", re.MULTILINE)
    if match is not None:
        return int(match[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all memory of other Unix systems
    except (AttributeError, ValueError, OSError):
        return None


def _free_in_group(folder: Path) -> int | None:
    """Return the memory that a control group can allocate. Its page cache counts as free."""
    names = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for limit_name, usage_name in names:
        limit, usage = _read(folder / limit_name), _read(folder / usage_name)
        if limit is None or usage is None or not limit.isdigit() or int(limit) >= _LIMITED:
            continue
        match = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
        return max(0, int(limit) - int(usage) + (int(match[1]) if match else 0))
    return None


def _control_groups(controller: str) -> list[Path]:
    """Return the folders of the control group of this process and of its parents, in versions 1 and 2."""
    root, folders = Path("/sys/fs/cgroup"), []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / path.lstrip("/")
        # In a container, the path may be that of the host, and the group of the container is the top.
        folders += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
