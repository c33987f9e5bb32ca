"""State of which each process holds a share (FSDP2), saved by as many processes as there are, loaded by any number.

A sharded tensor is cut by rows, as torch.chunk would. Each process writes the rows that it holds to a file of its own,
whose header says where they begin: nobody ever holds more than its share. A tensor that every process holds whole is
written once. `torch.distributed.checkpoint` writes files of its own (pickled ones among them), and its state dicts name
a tied weight twice; here one file is as safe to read as another.
"""

from __future__ import annotations

import json
import re
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from train_loop.checkpoint.durable import manifest_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]  # parameters and buffers, or an optimizer's tensors, by name


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")  # a DTensor: to import the class takes most of a second


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or put together of every process's share: then to be called on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def named_tensors(model: torch.nn.Module) -> Tensors:
    """{name: parameter or buffer}, a tied weight under its first name alone."""
    every_name = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: t for name, t in model.state_dict().items() if name not in every_name}
    return dict(model.named_parameters()) | buffers


def unsharded_tensors(model: torch.nn.Module, keep: bool) -> Tensors:
    """`named_tensors`, whole and on the CPU; {} where `keep` is false. To be called on every process."""
    gathered = {}
    for name, tensor in named_tensors(model).items():
        tensor = unsharded(tensor.detach())
        if keep:
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the rows of `tensor` on this process, the index of the first of them)"""
    if not is_sharded(tensor):
        return tensor, 0
    (placement,) = tensor.placements  # FSDP's: over one dimension of processes, by rows
    assert placement.is_shard(0)
    rows_each = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(tensor.device_mesh.get_local_rank() * rows_each, len(tensor))


def write_share(tensors: Tensors, path: Path, is_main: bool) -> None:
    """Writes this process's rows of `tensors`, and on the main process also those tensors that are not sharded.
    Raises OSError."""
    rows, first_rows = {}, {}
    for name, tensor in tensors.items():
        if is_main or is_sharded(tensor):
            local, first_rows[name] = local_rows(tensor.detach())
            rows[name] = local.cpu().contiguous()
    try:
        path.touch()
        mode = path.stat().st_mode  # of any new file; safetensors lets nobody else read its own
        save_file(rows, path, metadata={"first_rows": json.dumps(first_rows, sort_keys=True)})
        path.chmod(mode)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise OSError(str(error)) from error


class Shares:
    """The tensors in a checkpoint's `stem`.safetensors, or of the files that several processes wrote, each its rows.
    What the manifest does not name is not read."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.pieces: dict[str, list[tuple[Any, int]]] = {}  # name: [(file of `safe_open`, index of its first row)]
        pattern = rf"{stem}(-\d+-of-\d+)?\.safetensors"
        for name in sorted(name for name in manifest_of(folder)["files"] if re.fullmatch(pattern, name)):
            file = safe_open(folder / name, "pt")
            first_rows = json.loads((file.metadata() or {}).get("first_rows", "{}"))
            for name in file.keys():  # noqa: SIM118
                self.pieces.setdefault(name, []).append((file, first_rows.get(name, 0)))

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, of all its rows."""
        shapes = [file.get_slice(name).get_shape() for file, _ in self.pieces[name]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def read(self, name: str) -> torch.Tensor:
        """All rows of a tensor, on the CPU."""
        parts = [file.get_tensor(name) for file, _ in sorted(self.pieces[name], key=itemgetter(1))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def read_into(self, tensor: torch.Tensor, name: str) -> None:
        """Fills `tensor`, or the rows of it that this process holds."""
        local, first = local_rows(tensor)
        for file, start in self.pieces[name]:
            if not local.dim():
                local.copy_(file.get_tensor(name))
                continue
            piece = file.get_slice(name)
            begin, end = max(first, start), min(first + len(local), start + piece.get_shape()[0])
            if begin < end:
                local[begin - first : end - first].copy_(piece[begin - start : end - start])
