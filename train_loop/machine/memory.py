"""The memory of this machine and of this process: how much is available, how much is used, and whether it ran out."""

import os
import sys
from pathlib import Path

import psutil
import torch


def peaks() -> dict[str, float]:
    """The peaks of this process, as results name them."""
    return {"peak_memory_gib": peak_memory_gib()} | peak_device_memory_gib()


def peak_memory_gib() -> float:
    """The largest resident set that this process has had, in GiB."""
    if sys.platform == "linux":  # getrusage there starts from the size of the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # KiB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def peak_device_memory_gib() -> dict[str, float]:
    """{"peak_device_memory_gib": the most that torch had allocated on this process's GPU}, {} without one."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_device_memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def available_bytes(device: torch.device) -> float:
    """Bytes that this process may still use: of its GPU, or its share of what the machine or a limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out on a device or on the host. torch has an error class for devices only. For the host it
    raises a plain RuntimeError, which only its text identifies."""
    is_cpu = type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_cpu
