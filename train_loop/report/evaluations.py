"""What evaluations gave: numbers for metrics.jsonl, and the nats of each block, which `compare` reads.

    output_dir/evaluations/block_nats.safetensors
        <set>/targets [n] int32     of each block, in the order of the text: how many tokens are targets
        <set>/last/nats [n] float32     the sum of -log p over these targets, in the last evaluation
        <set>/best/nats [n] float32     the same in the one with the lowest validation loss
    with named_perplexities also
        <set>/bytes [n] int32     of the text that the block's tokens stand for, in UTF-8
        <set>/last/text_nats, <set>/best/text_nats [n] float32     as in "eval_text_nats", for this text

<set> is the name of a validation set: "validation" where there is only one. With `eval_stride` a block is a window: its
targets are the tokens that the window before it did not have. A checkpoint has the same file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from train_loop.errors import UserError, one_line
from train_loop.whole import cannot_be_written, write_whole

# in a folder of its own: some programs load every *.safetensors beside a config.json as weights
BLOCK_NATS = Path("evaluations") / "block_nats.safetensors"


@dataclass(frozen=True)
class BlockNats:
    """One evaluation of one validation set of n blocks. The arrays are those of the file, see above."""

    nats: np.ndarray
    targets: np.ndarray
    blocks: str  # stands for the tokens, and for how they are cut and which are targets
    text: str | None = None  # stands for the text of the whole set, however it is tokenised
    text_nats: np.ndarray | None = None
    num_bytes: np.ndarray | None = None


class Evaluation(dict[str, Any]):
    """The numbers of an evaluation by their names in metrics.jsonl; `block_nats` has those of each block, by the name
    of the validation set."""

    def __init__(self, *numbers: Any, block_nats: dict[str, BlockNats] | None = None) -> None:
        super().__init__(*numbers)
        self.block_nats = block_nats or {}


@dataclass(frozen=True)
class Kept:
    """The block nats of an evaluation that is kept. `step` is None for a model that was only evaluated."""

    step: int | None
    sets: dict[str, BlockNats]


def keep(kept: dict[str, Kept], step: int, evaluation: Evaluation, is_best: bool) -> dict[str, Kept]:
    """What is kept after one more evaluation. The best before it goes where it was of other blocks: a run may be
    resumed with other validation data."""
    last = Kept(step, evaluation.block_nats)
    best = last if is_best else kept.get("best")
    blocks = [{name: nats.blocks for name, nats in one.sets.items()} for one in (last, best) if one]
    return {"last": last, "best": best} if best and blocks[0] == blocks[1] else {"last": last}


def block_nats_as_bytes(kept: dict[str, Kept]) -> bytes:
    """The file, of {"last" or "best": evaluation}. Both are of the same blocks."""
    tensors: dict[str, np.ndarray] = {}
    sets = {}
    for when, evaluation in kept.items():
        for name, found in evaluation.sets.items():
            tensors |= {f"{name}/{when}/nats": found.nats, f"{name}/targets": found.targets}
            if found.text_nats is not None and found.num_bytes is not None:
                tensors |= {f"{name}/{when}/text_nats": found.text_nats, f"{name}/bytes": found.num_bytes}
            sets[name] = {"blocks": found.blocks, "text": found.text}
    steps = {when: evaluation.step for when, evaluation in kept.items()}
    # one entry: more would come in any order, and two runs that are the same would have different files
    return save(tensors, {"train_loop": json.dumps({"steps": steps, "sets": sets})})


def write_block_nats(output_dir: Path, kept: dict[str, Kept]) -> None:
    """Writes the file into output_dir, flushed to the disk. Raises UserError if it cannot be written."""
    path = output_dir / BLOCK_NATS
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_be_written(path, error) from error
    write_whole(path, block_nats_as_bytes(kept), durably=True)


def read_block_nats(path: Path) -> dict[str, Kept]:
    """{"last" or "best": evaluation} of a file. Raises UserError if it cannot be read; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["train_loop"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        return {
            when: Kept(
                step,
                {
                    name: BlockNats(
                        tensors[f"{name}/{when}/nats"],
                        tensors[f"{name}/targets"],
                        **of_set,
                        text_nats=tensors.get(f"{name}/{when}/text_nats"),
                        num_bytes=tensors.get(f"{name}/bytes"),
                    )
                    for name, of_set in about["sets"].items()
                },
            )
            for when, step in about["steps"].items()
        }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"{path} cannot be read: {one_line(error)}"
        raise UserError(f"{reason}. Evaluate the model again with --eval_only") from error
