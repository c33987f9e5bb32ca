"""What a run shows and records: progress bar, table on the console, metrics.jsonl,
all_results.json, loss_curve.png.

Losses are nats per target token. `seconds` count training alone: evaluation and what comes before are left out.
Only the main process prints and writes; the others carry the same object and call the same methods.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from train_loop.errors import warn
from train_loop.position import Position
from train_loop.report.curve import Line, draw_run, of_each_set
from train_loop.report.evaluations import Evaluation, Kept, keep, write_block_nats
from train_loop.report.trackers import Trackers
from train_loop.whole import cannot_be_written, write_whole

if TYPE_CHECKING:
    import torch

STATE = ("sums", "tokens", "train_nats", "train_tokens", "train_seconds", "num_skipped_steps", "train_loss", "latest")
COUNTED = (
    "step",
    "epoch",
    "tokens_seen",
    "tokens_per_second",
    "mfu",
)  # what each line of training holds beside the sums
COLUMNS = ("step", "epoch", "train loss", "eval loss", "perplexity", "tokens/s")


class Metrics:
    """Sums since the last line, sums of the whole run, and where they are written."""

    def __init__(
        self,
        output_dir: Path | str,
        num_steps: int,
        is_main: bool,
        show_progress: bool = False,
        trackers: Trackers | None = None,
        mfu_per_token_rate: float | None = None,
        eval_names: Sequence[str] = ("validation",),
    ) -> None:
        self.output_dir, self.num_steps, self.is_main = Path(output_dir), num_steps, is_main
        self.show_progress, self.trackers = show_progress, trackers
        self.eval_names = eval_names  # of the validation sets: numbers of the first have no name in a line
        self.mfu_per_token_rate = mfu_per_token_rate  # mfu = this x tokens_per_second
        self.lines: list[Line] = []  # every line of metrics.jsonl
        self.block_nats: dict[str, Kept] = {}  # of the evaluations "last" and "best"
        self.train_nats, self.train_tokens, self.train_seconds = 0.0, 0, 0.0
        self.num_skipped_steps = 0
        self.bar: tqdm | None = None
        self.train_loss: float | None = None  # of the last training line
        self.latest: dict[str, Any] = {"step": 0, "epoch": 0.0}  # of the last optimizer step
        self.has_head = False  # of the table
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Any] = {}  # numbers, or tensors until they are fetched; the tokens too
        self.tokens: Any = 0
        self.started = time.perf_counter()

    def count_step(
        self,
        step: int,
        epoch: float,
        sums: dict[str, torch.Tensor],
        num_targets: torch.Tensor,
        values: dict[str, float | torch.Tensor],
    ) -> None:
        """Takes note of an optimizer step: its nats ("loss" in `sums`, with the loss's extras) and its targets, summed
        over all processes, and `values` of this step that a line is to hold as they are: the learning rate, the
        gradient's norm before clipping, and whatever else, each a number or a tensor of one number.

        Tensors stay on their device until a line is written: to read one, the host must wait for the device.
        Raises ValueError for a value that is not one number, or whose name a line has already."""
        assert step > self.latest["step"], f"step {step} is counted again: is position.step += 1 missing in loop.py?"
        for name, value in values.items():
            if name in (*COUNTED, *sums):
                raise ValueError(f"a line of metrics already has {name}: give the value a different name")
            if not hasattr(value, "__float__") or getattr(value, "numel", lambda: 1)() != 1:
                raise ValueError(f"{name} must be a number or a tensor of one number to stand in a line of metrics")
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.tokens = self.tokens + num_targets
        self.latest = {"step": step, "epoch": epoch}
        for name, value in values.items():
            self.latest[name] = value.detach() if hasattr(value, "detach") else float(value)
        if self.show_progress:
            self.bar = self.bar or tqdm(
                total=self.num_steps, initial=step - 1, desc="training", unit=" steps", leave=False, mininterval=0.5
            )
            if self.bar.update(1):  # it was drawn
                self._fetch()
                loss = self.sums["loss"] / max(1, self.tokens)  # a window may have no target
                self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{self.latest['learning_rate']:.2e}", refresh=False)

    def _fetch(self) -> None:
        """Turns every tensor in the state into a number: a checkpoint and a line take numbers alone."""
        self.sums = {name: float(value) for name, value in self.sums.items()}
        self.tokens = int(self.tokens)
        self.latest = {name: value if name == "step" else float(value) for name, value in self.latest.items()}

    def count_skipped_step(self) -> None:
        self.num_skipped_steps += 1

    def leave_out(self, seconds: float) -> None:
        """Takes time that was not spent on training out of the tokens per second."""
        self.started += seconds

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the numbers continue where they were: all lines too. metrics.jsonl may be
        lost, damaged or in another folder: `write_lines` writes it again."""
        self._fetch()
        counts = {name: getattr(self, name) for name in STATE}
        trackers = self.trackers.ids if self.trackers else {}
        return {"lines": self.lines, "seconds": time.perf_counter() - self.started, "trackers": trackers, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        for name in STATE:
            setattr(self, name, state[name])
        self.lines = state["lines"]
        self.started = time.perf_counter() - state["seconds"]
        if self.trackers:
            self.trackers.ids = state.get("trackers", {})

    def write_lines(self) -> None:
        """Makes metrics.jsonl what it was at the checkpoint: one step has one line. Says where it was damaged. The same
        for the nats of blocks. Raises UserError."""
        path, lines = self.output_dir / "metrics.jsonl", [json.dumps(line) + "\n" for line in self.lines]
        if path.is_file():
            found = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[: len(lines)]
            differ = [number for number, pair in enumerate(zip_longest(lines, found), 1) if pair[0] != pair[1]]
            if differ:
                warn(f"{path} is damaged from line {differ[0]} on: its lines come from the checkpoint")
        write_whole(path, "".join(lines))
        write_block_nats(self.output_dir, self.block_nats)

    def log_training(self) -> None:
        """A line of metrics.jsonl: the token-weighted mean loss since the line before it, if there was a step."""
        self._fetch()
        if not self.tokens:
            return
        seconds = time.perf_counter() - self.started
        means = {name: value / self.tokens for name, value in self.sums.items()}
        self.train_loss = means["loss"]
        self.train_nats += self.sums["loss"]
        self.train_tokens += self.tokens
        self.train_seconds += seconds
        values = {name: value for name, value in self.latest.items() if name not in COUNTED}
        line = {
            "step": self.latest["step"],
            "epoch": round(self.latest["epoch"], 6),
            **means,
            **values,
            "tokens_seen": self.train_tokens,
            "tokens_per_second": self.tokens / seconds,
        }
        if self.mfu_per_token_rate:
            line["mfu"] = self.mfu_per_token_rate * line["tokens_per_second"]
        self._write(line)
        if self.is_main and not self.show_progress:
            self._row(line["step"], line["epoch"], f"{self.train_loss:.4f}", speed=line["tokens_per_second"])
        self._restart()

    def log_evaluation(self, position: Position, evaluation: Evaluation, samples: dict[str, str] | None = None) -> None:
        """A line of metrics.jsonl, a row of the table for each validation set, and the nats of each block. A row has
        its set's name where there are several; the first one has the training loss up to here, too. `position`: where
        the evaluation was made, and whether it is the best. `samples`: {prompt: the text that continues it}."""
        step, epoch = position.step, position.in_epochs()
        self.block_nats = keep(self.block_nats, step, evaluation, is_best=position.best_step == step)
        if self.is_main:
            write_block_nats(self.output_dir, self.block_nats)
        self._write({"step": step, "epoch": round(epoch, 6), **evaluation, **({"samples": samples} if samples else {})})
        if self.is_main:
            train_loss = "" if self.train_loss is None or not self.show_progress else f"{self.train_loss:.4f}"
            for name, (loss, perplexity) in of_each_set(evaluation, self.eval_names).items():
                set_name = name if len(self.eval_names) > 1 else ""
                self._row(step, epoch, train_loss, f"{loss:.4f}", f"{perplexity:.2f}", set_name=set_name)
                train_loss = ""
            for prompt, text in (samples or {}).items():
                tqdm.write(f"{'':>10} {json.dumps(prompt, ensure_ascii=False)} {json.dumps(text, ensure_ascii=False)}")
        self._restart()

    def _row(
        self,
        step: int,
        epoch: float,
        train_loss: str = "",
        eval_loss: str = "",
        ppl: str = "",
        speed: float | None = None,
        set_name: str = "",
    ) -> None:
        # a row of an evaluation has no speed: there is room for a name
        row = (f"{step:,}", f"{epoch:.2f}", train_loss, eval_loss, ppl, f"{speed:,.0f}" if speed else set_name)
        if not self.has_head:
            self.has_head = True
            tqdm.write(" ".join(f"{name:>10}" for name in COLUMNS))
        tqdm.write(" ".join(f"{cell:>10}" for cell in row).rstrip())
        sys.stdout.flush()

    def _write(self, line: Line) -> None:
        self.lines.append(line)
        if self.is_main:
            path = self.output_dir / "metrics.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk may show only when the file is closed, and then names no file
                raise cannot_be_written(path, error) from error
            if self.trackers:
                self.trackers.log(line)

    def finish(self, evaluation: dict[str, Any], checkpoint_seconds: float = 0.0) -> dict[str, Any]:
        """The results of the whole run, and the picture of its losses in output_dir."""
        if self.bar:
            self.bar.close()
        if self.is_main:
            try:
                draw_run(self.lines, self.output_dir / "loss_curve.png", self.eval_names)
            except Exception as error:  # a picture is not worth the model that is about to be exported
                print(f"warning: loss_curve.png was not drawn: {error}", file=sys.stderr)
        return {
            "epoch": round(self.latest["epoch"], 6),
            "step": self.latest["step"],
            "train_loss": self.train_nats / max(1, self.train_tokens),
            **evaluation,
            "train_tokens": self.train_tokens,
            "train_runtime": self.train_seconds,
            "tokens_per_second": self.train_tokens / self.train_seconds if self.train_seconds else 0.0,
            "checkpoint_runtime": checkpoint_seconds,
        }


def table(results: dict[str, float]) -> str:
    """{"eval_loss": 1.5} as a line `eval_loss            1.5000`."""
    width = max(20, *map(len, results))
    return "\n".join(
        f"{name:<{width}} {value:,.4f}" if isinstance(value, float) else f"{name:<{width}} {value:,}"
        for name, value in results.items()
    )
