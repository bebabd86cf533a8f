"""What an accelerator could do, what it holds, what it draws."""

from __future__ import annotations

import re
import resource
from functools import cache
from pathlib import Path

import torch

# Dense bf16 tensor peaks in TFLOP/s from the vendors' data sheets (fp16 where a device has no bf16), for one device as
# torch counts them: a die of MI250X. All words of a key occur in the device's name; the first match wins.
_PEAKS = {
    "gb300": 2500.0, "b300": 2250.0, "gb200": 2500.0, "b200": 2250.0, "gh200": 989.4, "h200 nvl": 835.5, "h200": 989.4,
    "h100 pcie": 756.0, "h100 nvl": 835.5, "h100": 989.4, "h800 pcie": 756.0, "h800": 989.4, "h20": 148.0,
    "a100": 312.0, "a800": 312.0, "a40": 149.7, "a30": 165.0, "a10g": 70.0, "a10": 125.0, "a6000": 154.8,
    "l40s": 362.0, "l40": 181.0, "l4": 121.0, "v100": 125.0, "t4": 65.0, "6000 ada": 364.2, "5090": 209.5,
    "4090": 165.2, "3090": 71.0, "mi355x": 2500.0, "mi325x": 1307.4, "mi300x": 1307.4, "mi250x": 191.5, "mi250": 181.0,
    "mi210": 181.0,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Peak of an accelerator by the name its driver gives, in TFLOP/s; None where it is unknown."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if "laptop" in words:
        return None
    return next((peak for key, peak in _PEAKS.items() if words.issuperset(key.split())), None)


def memory_bytes(device: torch.device) -> dict[str, int]:
    """`allocated`, `reserved` and `peak` (of allocated) in bytes; on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "allocated": pages * resource.getpagesize(),
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


@cache
def _has_nvml(device: torch.device) -> bool:
    try:
        torch.cuda.temperature(device)
    except Exception:  # no pynvml, no such sensor, no permission: each has its own type
        return False
    return True


def sensors(device: torch.device) -> dict[str, float]:
    """`power_watts` and `temperature_celsius` of an NVIDIA accelerator; nothing where NVML does not tell."""
    if device.type != "cuda" or not _has_nvml(device):
        return {}
    return {
        "power_watts": torch.cuda.power_draw(device) / 1000,
        "temperature_celsius": float(torch.cuda.temperature(device)),
    }
