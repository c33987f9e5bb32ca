"""The random states of a process that a checkpoint keeps: of Python, NumPy, torch and the device."""

import random
from typing import Any

import numpy as np
import torch

from train_loop.errors import UserError


def rng_state() -> dict[str, Any]:
    """The random states of this process, as values that JSON can hold."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "device": torch.get_device_module(device).get_rng_state().tolist() if device else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the random states. Raises UserError if one does not fit: with different random numbers the run would be
    a different one."""
    try:
        version_, keys, gauss = state["python"]
        random.setstate((version_, tuple(keys), gauss))
        np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], dtype=np.uint32), *state["numpy"][2:]))
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if (state["device"] is not None) != torch.accelerator.is_available():
            raise ValueError("it was saved on another kind of device")
        if state["device"] is not None:
            device = torch.accelerator.current_accelerator()
            torch.get_device_module(device).set_rng_state(torch.tensor(state["device"], dtype=torch.uint8))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's random state cannot be restored: {error}") from error
