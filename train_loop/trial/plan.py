"""Plans a run before it starts (`--dry_run`): its memory, its time, and which of them sets the limit.

The arithmetic comes first. It needs only shapes, so it holds for the launch config even if this machine cannot run it.
Then the real model takes a few real steps. Their result is discarded: nothing is written to output_dir.

P: parameters, 4 bytes each (a tied weight once). Per process, DDP: weights 4 P, gradients 4 P, AdamW's two moments 8 P,
and with several processes the exchange's copy of the gradients 4 P. FSDP: a share of each, plus the layers in use.
"""

import dataclasses
import math
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train_loop import loop
from train_loop.checkpoint import Checkpoints
from train_loop.data import Split, TrainingData
from train_loop.errors import UserError
from train_loop.evaluate import evaluate_splits
from train_loop.head import ROWS_PER_CHUNK, ROWS_PER_CHUNK_ELSEWHERE
from train_loop.loss import count_targets, next_token_loss
from train_loop.machine import asks_for_fsdp, available_bytes, peak_memory_gib, resident_bytes
from train_loop.position import Position
from train_loop.process import StopSignal
from train_loop.report import Metrics
from train_loop.services import Services
from train_loop.settings import Settings
from train_loop.trial.micro_batch import trial_batch

# the heap grows in the first steps, which take up to twice as long (tuning.py): the first half is not counted
NUM_MICRO_BATCHES = 8
MB, GIB = 1e6, 2**30
NO_TARGET = (
    "dry_run cannot measure a step: the micro-batches that it tried have no target. Give a larger block_size or "
    "per_device_train_batch_size"
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the planned run would train with."""

    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    train_split: TrainingData
    eval_splits: dict[str, Split]
    settings: Settings
    accelerator: Accelerator
    stop: StopSignal


def state_bytes(
    model: torch.nn.Module, num_processes: int = 1, sharded: bool = False, accumulates: bool = False, half: bool = False
) -> dict[str, int]:
    """{"weights", "gradients", "optimizer", "exchange"}: bytes of one process, for AdamW in the parameters' precision.
    Muon needs a little less: it has one moment per hidden matrix.

    `sharded`: FSDP. Each process has a share by rows, rounded up. Gradients are unsharded if the run `accumulates`. The
    exchange holds unsharded weights, in `half` precision if the launch config says so: everything outside the layers,
    and two layers (one arrives while one computes).
    """
    parts = num_processes if sharded else 1
    of = lambda tensors: sum(t.nbytes for t in tensors)  # noqa: E731
    share = lambda tensors: sum(  # noqa: E731
        -(-len(t) // parts) * (t.nbytes // len(t)) if t.dim() else t.nbytes for t in tensors
    )
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    exchange = 0
    if sharded and num_processes > 1:
        kinds = getattr(model, "_no_split_modules", None) or ()
        layers = [of(m.parameters()) for m in model.modules() if type(m).__name__ in kinds]
        exchange = (of(parameters) - sum(layers) + sum(sorted(layers)[-2:])) // (2 if half else 1)
    elif num_processes > 1:
        exchange = of(trained)
    return {
        "weights": share(parameters) + of(model.buffers()),
        "gradients": of(trained) if accumulates else share(trained),
        "optimizer": 2 * share(trained),
        "exchange": exchange,
    }


def bytes_exchanged(
    model: torch.nn.Module, num_processes: int, sharded: bool, accumulation: int, half: bool = False
) -> float:
    """Bytes that each of n processes sends in an optimizer step. DDP sums gradients in a ring: 2 (n - 1) / n times
    their size. FSDP gathers all weights, frozen ones too, twice per micro-batch (maybe in `half` precision); the last
    scatters the gradients' sum. A gather or scatter sends (n - 1) / n of the size."""
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    size = accumulation * (1 if half else 2) * weights + gradients if sharded else 2 * gradients
    return (num_processes - 1) / num_processes * size


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that torch makes within it and has not freed; `peak` is their highest sum.
    It counts by shapes, without a kernel's workspace or what an allocator keeps."""

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.existing = list(existing)  # kept alive, so that no new tensor gets their id
        self.known = {id(t.untyped_storage()) for t in existing}
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable, types: Any, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:  # or a sparse one's parts
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:  # torch keeps one Python object for a storage as long as it lives
                    self.known.add(id(storage))
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def working_bytes(
    model: torch.nn.Module, split: TrainingData, settings: Settings, accelerator: Accelerator
) -> tuple[float, float, int]:
    """(fixed, per block, tried): bytes at the peak of a micro-batch's passes, gradients included. The first two give a
    line through the peaks of two smaller ones: above a chunk of the head's rows the peak grows linearly. `tried` is
    the larger one's peak. Raises UserError if they have no target."""
    rows = ROWS_PER_CHUNK.get(accelerator.device.type, ROWS_PER_CHUNK_ELSEWHERE)
    size = max(1, min(-(-rows // (settings.block_size - 1)), settings.per_device_train_batch_size // 2))
    peaks = []
    for num_blocks in (size, 2 * size):
        batch = trial_batch(split, num_blocks, accelerator.device)
        with torch.random.fork_rng(), accelerator.no_sync(model):
            with LiveBytes(*model.parameters(), *model.buffers(), *batch.values()) as counted:
                for _ in range(min(settings.gradient_accumulation_steps, 2)):  # the second has gradients
                    accelerator.backward(next_token_loss(model, batch)[0])
            model.zero_grad(set_to_none=True)
        peaks.append(counted.peak)
    if not count_targets(batch["labels"]):
        raise UserError(NO_TARGET)
    # if gradients alone set the peak, a block needs at least its ids and labels
    per_block = max((peaks[1] - peaks[0]) / size, 16.0 * settings.block_size)
    return peaks[0] - size * per_block, per_block, peaks[1]


def measure(run: Planned) -> dict[str, float]:
    """{"step", "evaluation", "exchange": seconds, "peak": bytes} of a few steps of the loop itself, with the run's own
    micro-batch. At most two micro-batches of a step are run; the time of the others is computed from these. Raises
    UserError if the measured steps have no target."""
    model, settings, accelerator, eval_splits = run.model, run.settings, run.accelerator, run.eval_splits
    world_size, accumulation = accelerator.num_processes, min(settings.gradient_accumulation_steps, 2)
    num_steps = NUM_MICRO_BATCHES // accumulation
    few = dataclasses.replace(
        settings,
        gradient_accumulation_steps=accumulation,
        max_train_steps=num_steps,
        eval_steps=num_steps,
        eval_delay=0.0,
        logging_steps=1,
        checkpointing_steps="none",
    )
    batch = settings.per_device_eval_batch_size * world_size
    few_blocks = {n: dataclasses.replace(split, blocks=split.blocks[: 2 * batch]) for n, split in eval_splits.items()}
    metrics, checkpoints = Metrics("", num_steps, is_main=False), Checkpoints(few, accelerator)
    services = Services(accelerator, metrics, checkpoints, run.stop)
    loop.train(
        model=model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        position=Position(),
        train_split=run.train_split,
        eval_splits=few_blocks,
        settings=few,
        services=services,
    )
    device = accelerator.device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_gib() * GIB

    lines = [line for line in metrics.lines if "loss" in line]
    if not any(line["step"] > num_steps // 2 for line in lines):
        raise UserError(NO_TARGET)
    tokens = [b["tokens_seen"] - a["tokens_seen"] for a, b in zip([{"tokens_seen": 0}, *lines], lines)]  # noqa: B905
    blocks_of_step = few.blocks_per_step(world_size)
    num_blocks = run.train_split.blocks_in_epoch(settings) or blocks_of_step
    of_step = blocks_of_step * max(tokens) / min(blocks_of_step, num_blocks)
    step = median(of_step / line["tokens_per_second"] for line in lines if line["step"] > num_steps // 2)

    def seconds_of(action: Callable[[], Any]) -> float:
        action()
        began = time.perf_counter()
        action()
        accelerator.wait_for_everyone()
        return time.perf_counter() - began

    num_batches, num_tried = (
        sum(math.ceil(split.num_blocks / batch) for split in splits.values()) for splits in (eval_splits, few_blocks)
    )
    evaluation = seconds_of(lambda: evaluate_splits(model, few_blocks, settings, accelerator)) * num_batches / num_tried
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    once = seconds_of(lambda: [accelerator.clip_grad_norm_(model.parameters(), 1.0), run.optimizer.step()])
    run.optimizer.zero_grad()
    exchange = 0.0
    if world_size > 1:
        gradients = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad), device=device)
        exchange = seconds_of(lambda: accelerator.reduce(gradients))
    further = settings.gradient_accumulation_steps - accumulation
    step += further * max(0.0, step - once - exchange) / accumulation
    return {"step": step, "evaluation": evaluation, "exchange": exchange, "peak": peak}


def print_plan(run: Planned) -> None:
    """Prints the plan on the main process; call it on all. It trains the model a few steps: do not use it further."""
    model, train_split, settings, accelerator = run.model, run.train_split, run.settings, run.accelerator
    say = lambda *lines: accelerator.print(*lines, sep="\n", flush=True)  # noqa: E731
    gib = lambda size: f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / MB:.1f} MB"  # noqa: E731
    W, B, A = accelerator.num_processes, settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    unwrapped, device = accelerator.unwrap_model(model), accelerator.device
    sharded, runs_sharded = asks_for_fsdp(), accelerator.distributed_type == "FSDP"
    available = available_bytes(device)

    half = accelerator.mixed_precision in ("bf16", "fp16")

    def parts_of(sharded: bool) -> dict[str, int]:
        return state_bytes(unwrapped, W, sharded, A > 1, half)

    parts, here = parts_of(sharded), parts_of(runs_sharded)
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    how = f"FSDP over {W}" if sharded else f"DDP, {W} copies" if W > 1 else "one process"
    size = sum(p.numel() for p in unwrapped.parameters())
    sent = bytes_exchanged(unwrapped, W, sharded, A, half)
    say(f"state       of a process ({how}): {listed} = {gib(sum(parts.values()))}, for {size:,} parameters")
    if W > 1:
        say(f"exchange    each process sends {gib(sent)} in an optimizer step")

    fixed, per_block, tried = working_bytes(model, train_split, settings, accelerator)
    fixed -= parts_of(False)["gradients"]  # counted above
    working = max(0.0, fixed + B * per_block)
    say(f"activations {gib(working)} beside the state at the peak; {gib(per_block)} for each block more or less")
    counted = sum(here.values()) + working
    if device.type == "cpu":  # it also holds libraries, data, and what the small micro-batches needed
        counted = max(peak_memory_gib() * GIB, resident_bytes() + counted - here["weights"] - tried)
    room = available - sum(here.values()) + here["weights"] - fixed
    largest = max(0, math.floor(room / per_block))
    say(
        f"memory      counted {gib(counted)} at the peak"
        + (", libraries and data included" if device.type == "cpu" else "")
    )
    say(f"            {gib(available)} are free for a process: micro-batches up to {largest:,} fit")
    if largest < B:
        say("limit       memory: the micro-batch does not fit, and no step is tried. Give --auto_micro_batch")
        return

    found = measure(run)
    # None for a stream: evaluations at the ends of its epochs are not counted
    num_blocks = train_split.blocks_in_epoch(settings)
    num_steps, per_epoch = settings.num_steps(num_blocks, W), settings.steps_per_epoch(num_blocks, W)
    num_evaluations = 1 + -(-num_steps // (settings.eval_steps or per_epoch or num_steps))
    per_step = settings.blocks_per_step(W)
    num_blocks_seen = num_steps * per_step
    if num_blocks and per_epoch:
        num_blocks_seen = num_blocks * (num_steps // per_epoch) + min(num_blocks, num_steps % per_epoch * per_step)
    of_block = settings.block_size - 1.0  # targets; in a stream it is unknown how many are prompts
    if isinstance(train_split, Split):
        of_block = train_split.num_targets / train_split.num_blocks
    num_tokens = round(num_blocks_seen * of_block)
    training = found["step"] * num_blocks_seen / per_step
    total = training + num_evaluations * found["evaluation"]
    share = found["exchange"] / found["step"]
    say(
        f"measured    {gib(found['peak'])} at the peak: {found['peak'] / counted - 1:+.1%} beside what was counted",
        f"time        {found['step']:.3f} s a step, the median of the last half of "
        f"{NUM_MICRO_BATCHES // min(A, 2)} of {min(A, 2)} micro-batches; {found['evaluation']:.2f} s an evaluation",
        f"total       {num_steps:,} steps, {num_tokens:,} target tokens: {training:,.0f} s + {num_evaluations} "
        f"evaluations {total - training:,.0f} s = {total:,.0f} s, start and saving not counted",
    )
    bound = "communication" if share > 0.5 else "compute"
    say(f"limit       {bound}" + (f": the exchange by itself takes {share:.1%} of a step's time" if W > 1 else ""))
