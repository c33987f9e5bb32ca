"""What brings the same numbers faster and in less memory: memory that stays, huge pages, threads, lean modules.

Each of it was measured to pay (README, Speed). `--tuning false` leaves everything but the threads as the libraries have
it. What is imported here before torch must stay light.
"""

import ctypes
import functools
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h of the GNU C library numbers them


def keep_memory():
    """Asks the GNU C library to keep freed memory, and torch to ask for huge pages. To be called before torch is
    imported; elsewhere than on Linux with that library it does nothing.

    A training step frees and asks for buffers of hundreds of megabytes. Each would be given back to the system and
    come again as pages of 4 KiB to be cleared one by one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_lean_modules(model):
    """Replaces modules of `model`, in place, by equals of torch's: the same numbers, to rounding, and no parameters."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers.activations import NewGELUActivation
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    class Dropout(torch.nn.Dropout):
        """Keeps a mask of bytes for the backward pass, as torch does on a GPU, where on a CPU it keeps one of floats.
        The random numbers are the same."""

        def forward(self, input):
            return torch.native_dropout(input, self.p, True)[0] if self.training else input

    def forward_of_mlp(mlp, hidden):
        """Keeps what goes into the activation only, and works its result out again in the backward pass: a product of
        matrices is not repeated, since the result is all that its gradient needs."""
        hidden = mlp.c_fc(hidden)
        project = lambda hidden: mlp.c_proj(mlp.act(hidden))  # noqa: E731
        return mlp.dropout(checkpoint(project, hidden, use_reentrant=False, preserve_rng_state=False))

    for module in list(model.modules()):
        if isinstance(module, GPT2MLP):
            module.forward = functools.partial(forward_of_mlp, module)
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # written out in eight operations, each with a tensor to keep
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
            elif type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))


def num_threads(settings):
    """CPU threads for this process: its share of the cores, unless the settings say otherwise. The launcher sets
    OMP_NUM_THREADS=1 where its config says nothing: one core would work, the others look on."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return settings.num_threads or max(1, num_cores() // processes_here)


def num_cores():
    """CPU cores that this process may use (a container or a scheduler may allow it fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
