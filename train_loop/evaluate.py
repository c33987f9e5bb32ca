"""The loss of a model on a validation split: the same number for any batch size and number of processes.

T: tokens in a block, B: windows in a batch, n: evaluated tokens, those of all blocks in order.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from train_loop.data import IGNORED, CoveredText, Split, model_inputs
from train_loop.loss import plain_next_token_loss
from train_loop.process import StopSignal
from train_loop.report import BlockNats, Evaluation
from train_loop.settings import Settings


def perplexity(loss: float) -> float:
    """exp(nats per token); infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def named_perplexities(nats: float, num_targets: float, text: CoveredText) -> dict[str, float]:
    """Perplexities that do not depend on the tokenizer, and the counts that they come from.

    `nats` and `num_targets` count only targets that stand for text. `text` is the `CoveredText` of the evaluated
    tokens. word_perplexity: exp(nats per word); white space separates words. word_eos_perplexity: the same, but each
    line end counts as one more word, as in the tables for WikiText. bits_per_byte: bits per byte of the text in UTF-8.

    All three use the same sum, "eval_text_nats", over every evaluated token that stands for text. A token that is not
    a target counts as the mean of the targets: the first token of each block (with `eval_stride` only that of the
    split), and with `document_attention` the first token of each document.
    Special tokens that stand for no text are not counted, but other tokens see them as context.

    Compare only tokenizers that keep all of the text. A tokenizer that lowercases the text, or that maps many
    characters to one unknown token, predicts less than the text and gets lower numbers.
    """
    num_text_tokens = int(text.is_text.sum())
    text_nats = nats / num_targets * num_text_tokens
    return {
        "word_perplexity": perplexity(text_nats / text.num_words),
        "word_eos_perplexity": perplexity(text_nats / (text.num_words + text.num_line_ends)),
        "bits_per_byte": text_nats / text.num_bytes / math.log(2),
        "eval_text_nats": text_nats,
        "eval_text_tokens": num_text_tokens,
        "eval_words": text.num_words,
        "eval_line_ends": text.num_line_ends,
        "eval_bytes": text.num_bytes,
    }


def shares(num_windows: int, batch_size: int, world_size: int, rank: int) -> list[range]:
    """The windows of each of this process's batches, as ranges. All processes have the same number of batches. If the
    last batch has too few windows for all processes, some get an empty range."""
    per_batch = batch_size * world_size
    batches = [range(first, min(first + per_batch, num_windows)) for first in range(0, num_windows, per_batch)]
    sizes = [-(-len(batch) // world_size) for batch in batches]
    return [batch[rank * size : (rank + 1) * size] for batch, size in zip(batches, sizes, strict=True)]


def batch_of(split: Split, windows: range, stride: int) -> dict[str, torch.Tensor]:
    """The windows with these numbers: {"input_ids", "labels"}, each [B, T] of int64. If documents are kept apart, also
    {"position_ids"}. If some special tokens stand for no text, also {"target_is_text"} of bool.

    Window i begins at token i * stride. Its targets are the tokens that the previous window did not have; `labels` are
    -100 elsewhere. The last window may be short and is padded. An empty range gives one window without targets: the
    forward pass of a sharded model needs all processes.
    """
    tokens, block_size = split.blocks.reshape(-1), split.blocks.shape[1]
    own = np.zeros((max(1, len(windows)), block_size), dtype=tokens.dtype)
    is_new, is_text = np.zeros(own.shape, dtype=bool), np.ones(own.shape, dtype=bool)
    for row, window in enumerate(windows):
        begin, num_context = window * stride, block_size - stride if window else 0
        after = split.tail[max(0, begin - len(tokens)) :]
        ids = np.concatenate([tokens[begin : begin + block_size], after])[:block_size]
        own[row, : len(ids)] = ids
        is_new[row, num_context : len(ids)] = True
        if split.text:
            is_text[row, : len(ids)] = split.text.is_text[begin : begin + len(ids)]
    batch = model_inputs(own, split.documents_apart)
    batch["labels"][~is_new] = IGNORED
    if split.text and not split.text.is_text.all():
        batch["target_is_text"] = is_text
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def add_windows(of_windows: torch.Tensor, windows: range, token_nats: torch.Tensor, batch: dict) -> None:
    """Writes the sums over each window of a batch into its column of `of_windows`, [4, all windows]: nats, number of
    targets, and both for the targets that stand for text. `token_nats` [B, T - 1]."""
    some = slice(windows.start, windows.start + len(windows))  # empty for a process without windows
    is_target = batch["labels"][:, 1:] != IGNORED
    is_text = is_target & batch["target_is_text"][:, 1:] if "target_is_text" in batch else is_target
    rows = token_nats, is_target, token_nats * is_text, is_text
    of_windows[:, some] = torch.stack([row.float().sum(1) for row in rows])[:, : len(windows)]


def block_nats(of_windows: np.ndarray, split: Split, stride: int) -> BlockNats:
    """The nats of each window of a split, for `compare`; `of_windows` as `add_windows` left it."""
    nats, targets = of_windows[0], of_windows[1].astype(np.int32)
    digest = hashlib.blake2b(split.tail.tobytes(), digest_size=16)
    digest.update(f"{split.digest()} {split.blocks.shape[1]} {stride} {split.documents_apart}".encode())
    if split.text is None:
        return BlockNats(nats, targets, digest.hexdigest())
    # where each window's new tokens end; tokens that no window holds are left out
    ends = np.minimum(split.blocks.shape[1] + stride * np.arange(len(nats)), len(split.text.is_text))
    num_text_tokens = np.diff(split.text.is_text.cumsum()[ends - 1], prepend=0)
    # a text token that is not a target counts as the mean of all targets, as in `named_perplexities`
    _, _, text_nats, text_targets = of_windows
    text_nats = text_nats + (num_text_tokens - text_targets) * (text_nats.sum() / text_targets.sum())
    num_bytes = np.diff(split.text.byte_ends[ends - 1], prepend=0).astype(np.int32)
    return BlockNats(nats, targets, digest.hexdigest(), split.text.digest, text_nats.astype(np.float32), num_bytes)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    split: Split,
    settings: Settings,
    accelerator: Accelerator,
    show_progress: bool = False,
    stop: StopSignal | None = None,
) -> Evaluation | None:
    """{"eval_loss": nats per target token, "perplexity": its exponential, "eval_tokens": number of targets,
    "eval_nats": their sum, "eval_stride", "eval_dropped_tokens": tokens at the end that no window holds}, and on
    request the `named_perplexities`. If training does not minimise plain cross entropy, "eval_objective" is what it
    minimises, per target.

    Without `eval_stride` each block is a window: it has no earlier context, and its first token is not a target. With
    it, windows of T tokens advance by the stride, also over the tokens after the last block. Each target sees at least
    T - stride tokens of context, except in the first window. This is the sliding window of transformers' guide
    "Perplexity of fixed-length models", with each target counted once.
    Returns None if `stop`, a `StopSignal`, arrives during the evaluation.
    The nats and targets of all processes are summed once, at the end, in float64. Those of each window are returned
    too, as `block_nats` under the split's name. Training is not affected: the model's mode is restored, and no random
    number is drawn.
    """
    block_size = split.blocks.shape[1]
    stride = settings.eval_stride or block_size
    num_windows = 1 + -(-(split.blocks.size + len(split.tail) - block_size) // stride)
    processes = accelerator.num_processes, accelerator.process_index
    own = shares(num_windows, settings.per_device_eval_batch_size, *processes)
    sums: dict[str, Any] = {}  # over the split's targets: nats, targets, and whatever else the loss wants logged
    of_windows = torch.zeros(4, num_windows, device=accelerator.device)  # nats and targets; the same of text alone
    was_training = model.training
    model.eval()
    for windows in tqdm(own, desc="evaluating", unit=" batches", disable=not show_progress, leave=False):
        if stop is not None and stop.agreed(accelerator):
            model.train(was_training)
            return None
        batch = {name: value.to(accelerator.device) for name, value in batch_of(split, windows, stride).items()}
        nll, num_targets, extras = plain_next_token_loss(model, batch)
        add_windows(of_windows, windows, extras.pop("token_nats"), batch)
        for name, value in {"loss": nll, "tokens": num_targets, **extras}.items():
            sums[name] = sums.get(name, 0) + value.double()
    model.train(was_training)
    of_windows = accelerator.reduce(of_windows, "sum")  # each window has numbers in one process, zeros in the others
    sums = {name: value.item() for name, value in accelerator.reduce(sums, "sum").items()}
    num_targets = sums.pop("tokens")
    of_text = sums.pop("text_nats", sums["loss"]), sums.pop("text_targets", num_targets)
    if sums["objective"] == sums["loss"]:  # plain cross entropy is what is trained
        del sums["objective"]
    means = {f"eval_{name}": value / num_targets for name, value in sums.items()}
    result = Evaluation({**means, "perplexity": perplexity(means["eval_loss"]), "eval_tokens": int(num_targets)})
    result.block_nats[split.name] = block_nats(of_windows.cpu().numpy(), split, stride)
    if settings.named_perplexities:
        assert split.text is not None
        result |= named_perplexities(*of_text, split.text)
    if settings.named_perplexities or settings.eval_stride:
        result |= {"eval_nats": sums["loss"], "eval_stride": stride, "eval_dropped_tokens": split.num_dropped}
    return result


def evaluate_splits(
    model: torch.nn.Module,
    splits: dict[str, Split],
    settings: Settings,
    accelerator: Accelerator,
    show_progress: bool = False,
    stop: StopSignal | None = None,
) -> Evaluation | None:
    """What `evaluate` returns for the first split, and the same for each other split as "eval_<name>_loss" and so on.
    None if a stop arrived during it."""
    result = Evaluation()
    for name, split in splits.items():
        found = evaluate(model, split, settings, accelerator, show_progress, stop)
        if found is None:
            return None
        result.block_nats[name] = found.block_nats[split.name]
        result |= {f"eval_{name}_{key.removeprefix('eval_')}": found[key] for key in found} if result else found
    return result
