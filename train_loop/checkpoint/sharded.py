"""State that is sharded over the processes (FSDP2). All processes save it; any number of processes can load it.

A sharded tensor is cut by rows, as torch.chunk does. Each process writes the rows that it holds to a file of its own,
whose header says where they begin. So no process ever holds more than its shard. A tensor that is not sharded is
written once. `torch.distributed.checkpoint` is not used: some of its files are pickled, and its state dicts name a tied
weight twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from train_loop.checkpoint.durable import manifest_of
from train_loop.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]  # parameters and buffers, or an optimizer's tensors, by name


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")  # a DTensor: importing the class takes most of a second


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself; a sharded one is gathered from all processes. Call it on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def named_tensors(model: torch.nn.Module) -> Tensors:
    """{name: parameter or buffer}; a tied weight only under its first name."""
    every_name = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: t for name, t in model.state_dict().items() if name not in every_name}
    return dict(model.named_parameters()) | buffers


def saved_tensors(model: torch.nn.Module) -> Tensors:
    """`named_tensors` without frozen weights, which come from the model that a run begins with."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in named_tensors(model).items() if name not in frozen}


def digest_of_frozen(model: torch.nn.Module) -> str | None:
    """A digest of the frozen weights of `model`, unsharded; None if all are trained. It is made of the sums of their
    bits as whole numbers: enough to tell one model from another, and as fast as memory is read."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    sums = {name: p.flatten().view(torch.int16).sum().item() for name, p in frozen.items()}
    return hashlib.blake2b(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:32] if sums else None


def unsharded_tensors(model: torch.nn.Module, keep: bool, frozen_alone: bool = False) -> Tensors:
    """`named_tensors`, unsharded and on the CPU; with `frozen_alone` those that `saved_tensors` leaves out. {} if
    `keep` is false. Call it on every process."""
    gathered = {}
    left_out = saved_tensors(model).keys() if frozen_alone else ()
    for name, tensor in named_tensors(model).items():
        if name in left_out:
            continue
        tensor = unsharded(tensor.detach())
        if keep:
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the rows of `tensor` on this process, the index of the first one)"""
    if not is_sharded(tensor):
        return tensor, 0
    (placement,) = tensor.placements  # FSDP's: one dimension of processes, by rows
    assert placement.is_shard(0)
    rows_each = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(tensor.device_mesh.get_local_rank() * rows_each, len(tensor))


def write_share(tensors: Tensors, path: Path, is_main: bool) -> None:
    """Writes this process's rows of `tensors`; the main process also writes the tensors that are not sharded. Raises
    OSError."""
    rows, first_rows = {}, {}
    for name, tensor in tensors.items():
        if is_main or is_sharded(tensor):
            local, first_rows[name] = local_rows(tensor.detach())
            rows[name] = local.cpu().contiguous()
    try:
        path.touch()
        mode = path.stat().st_mode  # the usual mode of a new file; safetensors would make it readable by the owner only
        save_file(rows, path, metadata={"first_rows": json.dumps(first_rows, sort_keys=True)})
        path.chmod(mode)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(str(error)) from error


class Shares:
    """The tensors of a checkpoint's `stem`.safetensors, or of the files to which several processes wrote their rows.
    Files that the manifest does not name are not read."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.pieces: dict[str, list[tuple[Any, int]]] = {}  # name: [(file of `safe_open`, index of its first row)]
        pattern = rf"{stem}(-\d+-of-\d+)?\.safetensors"
        for name in sorted(name for name in manifest_of(folder)["files"] if re.fullmatch(pattern, name)):
            file = safe_open(folder / name, "pt")
            first_rows = json.loads((file.metadata() or {}).get("first_rows", "{}"))
            for name in file.keys():  # noqa: SIM118
                self.pieces.setdefault(name, []).append((file, first_rows.get(name, 0)))

    def shape(self, name: str) -> list[int]:
        """The shape of the unsharded tensor."""
        shapes = [file.get_slice(name).get_shape() for file, _ in self.pieces[name]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def read(self, name: str) -> torch.Tensor:
        """The unsharded tensor, on the CPU."""
        parts = [file.get_tensor(name) for file, _ in sorted(self.pieces[name], key=itemgetter(1))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def read_into(self, tensor: torch.Tensor, name: str) -> None:
        """Fills `tensor`; if it is sharded, the rows that this process holds."""
        local, first = local_rows(tensor)
        for file, start in self.pieces[name]:
            if not local.dim():
                local.copy_(file.get_tensor(name))
                continue
            piece = file.get_slice(name)
            begin, end = max(first, start), min(first + len(local), start + piece.get_shape()[0])
            if begin < end:
                local[begin - first : end - first].copy_(piece[begin - start : end - start])


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Loads the weights of the checkpoint `path` into `model`, which is unwrapped. Raises UserError if they do not
    fit."""
    tensors, saved = saved_tensors(model), Shares(path, "model")
    if saved.pieces.keys() != tensors.keys():
        raise UserError(f"the weights in {path} are not those of this model: their names differ")
    for name, tensor in tensors.items():
        saved.read_into(tensor, name)


def load_optimizer(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
) -> None:
    """Loads the optimizer's state of the checkpoint `path` into `optimizer`. `scalars`: the part of it that is not
    tensors. If `model` is sharded, state of a parameter's shape is sharded too; other state (a count, a factor) is
    not."""
    parameters, saved = dict(model.named_parameters()), Shares(path, "optimizer")
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {id(p): number for number, p in enumerate(ordered)}
    state: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for name in [*saved.pieces, *scalars]:
        parameter_name, _, key = name.rpartition(".")
        parameter = parameters[parameter_name]
        if name in scalars:
            value = scalars[name]
        elif saved.shape(name) == list(parameter.shape):
            value = torch.empty_like(parameter)
            saved.read_into(value, name)
        else:
            value = saved.read(name).clone()
        state[numbers[id(parameter)]][key] = value
    # the optimizer decides which of them belong on the parameter's device
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
