"""Checkpoints: what a run needs to resume. A checkpoint is either complete or absent.

checkpoint.py    save, find, restore             durable.py  folders that are complete or absent
identity.py      does it belong to this run      sharded.py  state that is sharded over the processes
random_state.py  random states of a process      mirror.py   copies in a different place
"""

from train_loop.checkpoint.checkpoint import Checkpoints
from train_loop.checkpoint.durable import damage, damage_of_files, flushed, has_checkpoints, name_of
from train_loop.checkpoint.identity import run_identity
from train_loop.checkpoint.sharded import Shares, load_weights, named_tensors, unsharded, unsharded_tensors

__all__ = [
    "Checkpoints",
    "Shares",
    "damage",
    "damage_of_files",
    "flushed",
    "has_checkpoints",
    "load_weights",
    "name_of",
    "named_tensors",
    "run_identity",
    "unsharded",
    "unsharded_tensors",
]
