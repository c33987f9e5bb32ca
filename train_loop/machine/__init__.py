"""The machine: processes and devices, memory, speed, versions of libraries.

launch.py  processes, devices and threads           memory.py  available memory, used memory
flops.py   how much of a device is used             compat.py  differences between versions of the libraries
"""

from train_loop.machine.compat import checkpoint_activations
from train_loop.machine.flops import mfu_per_token_rate
from train_loop.machine.launch import (
    after_restart,
    asks_for_fsdp,
    build_accelerator,
    compile_in_place,
    end_training,
    is_lost_peer,
    prepare,
    quiet_libraries,
)
from train_loop.machine.memory import (
    available_bytes,
    is_out_of_memory,
    peak_device_memory_gib,
    peak_memory_gib,
    peaks,
    resident_bytes,
)

__all__ = [
    "after_restart",
    "asks_for_fsdp",
    "available_bytes",
    "build_accelerator",
    "checkpoint_activations",
    "compile_in_place",
    "end_training",
    "is_lost_peer",
    "is_out_of_memory",
    "mfu_per_token_rate",
    "peak_device_memory_gib",
    "peak_memory_gib",
    "peaks",
    "prepare",
    "quiet_libraries",
    "resident_bytes",
]
