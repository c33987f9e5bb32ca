"""The processes, devices and threads of a run."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs
from transformers import PreTrainedModel

from train_loop.errors import UserError, warn
from train_loop.settings import Settings
from train_loop.tuning import num_threads


def build_accelerator(settings: Settings) -> Accelerator:
    """Accelerate's `Accelerator` as the launch config asks for it, without gradient accumulation of its own.

    Raises UserError if the launcher started several processes that would each train alone, if the device does not
    support the precision, or if Accelerate would recompute activations. Warns if FSDP was asked for and is not
    available.
    """
    if asks_for_fsdp() and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise UserError(
            "the launch config says fsdp_activation_checkpointing: with it Accelerate recomputes activations with "
            "different dropout masks, so gradients are wrong. Remove it there, and give --gradient_checkpointing"
        )
    if asks_for_fsdp() and settings.optimizer == "muon":
        raise UserError(
            "optimizer muon needs whole matrices, and the launch config asks for FSDP, which shards them. Give "
            "--optimizer adamw, or a launch config without FSDP"
        )
    _choose_kernels(settings.deterministic)
    has_device = torch.accelerator.is_available()
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=settings.ddp_timeout))
    if _num_restarts():
        torch.distributed.register_rendezvous_handler("restart", _meet_after_restart)
        group.init_method = "restart://"
    # without cpu=True, CPU processes do not form a group: each would train alone
    accelerator = Accelerator(
        cpu=not has_device or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true", kwargs_handlers=[group]
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(f"the launcher started {launched} processes, but Accelerate formed {accelerator.num_processes}")
    if accelerator.distributed_type == DistributedType.FSDP:
        _sum_in_float32(accelerator)
    elif asks_for_fsdp() and accelerator.is_main_process:
        warn(
            "the launch config asks for FSDP, which Accelerate has for several GPUs only. Here nothing is sharded: "
            "every process holds the full model (DDP)"
        )
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    if accelerator.device.type == "cpu":
        if settings.tf32:
            raise UserError("tf32 needs a GPU: a CPU has no TF32")
        if accelerator.mixed_precision not in ("no", "bf16"):
            # Accelerate accepts the setting silently, and would train with neither autocast nor scaler
            raise UserError(f"mixed precision {accelerator.mixed_precision} needs a GPU: on a CPU use bf16 or no")
        torch.set_num_threads(num_threads(settings))
    return accelerator


def _choose_kernels(deterministic: bool) -> None:
    """With `deterministic`, torch's strict mode: nothing else makes attention's backward pass on a GPU deterministic.
    An operation without a deterministic kernel then raises RuntimeError."""
    torch.use_deterministic_algorithms(deterministic)
    # otherwise torch would fill buffers that are overwritten anyway
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it; read at its first product
        torch.backends.cudnn.benchmark = False


ALIVE: list[Any] = []  # what `prepare` made


def prepare(accelerator: Accelerator, *objects: Any) -> Any:
    """`accelerator.prepare`. With several processes, the prepared objects stay alive until the process exits: freeing
    DDP's wrapper after its process group can deadlock on Python's lock (it joins gloo's threads, and one of them may
    wait for the lock)."""
    prepared = accelerator.prepare(*objects)
    if accelerator.num_processes > 1:
        ALIVE.append(prepared)
    return prepared


def asks_for_fsdp() -> bool:
    """Whether the launch config says `distributed_type: FSDP`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _sum_in_float32(accelerator: Accelerator) -> None:
    """Under FSDP with bf16, Accelerate would round the model's output to bfloat16. Here the output is the sum of nats
    (29,696 instead of 29,655.5). It would also sum the gradients of the processes in bfloat16; DDP does so in
    float32."""
    if not accelerator.is_fsdp2:
        raise UserError("the launch config asks for FSDP 1: set fsdp_version: 2")
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=torch.float32, reduce_dtype=torch.float32
        )


def _num_restarts() -> int:
    """How often the launcher has restarted the processes of this machine (`--max_restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _meet_after_restart(url: str, **options: Any) -> Iterator[tuple]:
    """torch's env:// rendezvous with a new prefix for each restart, on one machine. The launcher's store outlives the
    processes: without the prefix, restarted processes sometimes read the addresses of the dead ones and wait for them.
    Each machine counts its own restarts, so several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead."""
    store, rank, world_size = next(torch.distributed.rendezvous(url.replace("restart:", "env:", 1), **options))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        store = torch.distributed.PrefixStore(f"restart-{_num_restarts()}", store)
    yield store, rank, world_size


def after_restart(settings: Settings, accelerator: Accelerator) -> Settings:
    """The settings of processes that a launcher restarted: they resume by themselves, whatever the command says. Each
    machine counts its own restarts, and one that lost no process counts none. So one restarted process decides for
    all."""
    num_restarts = accelerator.reduce(torch.tensor(_num_restarts(), device=accelerator.device), "sum")
    if num_restarts and settings.output_dir:
        wanted = settings.resume_from_checkpoint or "auto"
        return dataclasses.replace(settings, resume_from_checkpoint=wanted, overwrite_output_dir=False)
    return settings


def end_training(accelerator: Accelerator) -> Callable[..., None]:
    """An exit function for an `ExitStack` that closes the connections between the processes. Without it a run of
    several CPU processes aborts at exit.

    It does nothing after an error, because this process has not printed the error yet. Its peers would notice the
    closed connection and end, and the launcher would then end this process before it could print.
    """

    def end(kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if accelerator.num_processes == 1 or kind is None or not issubclass(kind, Exception):
            accelerator.end_training()

    return end


# gloo raises plain RuntimeErrors; their messages begin with the name of a source file
GLOO_SOURCE = re.compile(r"\[\S*/gloo/\S+\.(cc|h):\d+\]")


def is_lost_peer(error: Exception) -> bool:
    """Whether an exception comes from torch's communication: a peer has ended, or does not answer."""
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and GLOO_SOURCE.match(str(error)) is not None
    )


def compile_in_place(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """`torch.compile` as the launch config's `dynamo_config` asks for it, for everything below the head (the head
    computes its loss chunk by chunk). Accelerate would wrap the model instead, and every name in the exported weights
    would get the wrapper's prefix."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        model.base_model.compile(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO


def quiet_libraries(accelerator: Accelerator) -> bool:
    """Turns progress bars of the libraries off, except on a terminal and in the main process. Returns whether they are
    on."""
    show_progress = accelerator.is_main_process and sys.stderr.isatty()
    if not show_progress:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported, if it is
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()
    return show_progress
