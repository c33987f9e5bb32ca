"""Which recipe has the lower loss, by how much, and how sure that is: in words, and in a table."""

import math
from dataclasses import dataclass

import numpy as np

from train_loop.compare.intervals import Difference, difference
from train_loop.compare.runs import Run
from train_loop.errors import UserError
from train_loop.report import BlockNats

NAME_COLUMNS = 30


@dataclass(frozen=True)
class Measured:
    """Losses of recipes on the same pieces of text. `losses`: {recipe: [S, n]}, a sum for each of its S runs and n
    pieces; `weights` [n] divide them. Pieces are blocks, sums are nats, and `weights` count targets. If the tokens
    differ, pieces have equal numbers of bytes, sums are bits, and `weights` count bytes."""

    losses: dict[str, np.ndarray]
    weights: np.ndarray
    unit: str
    pieces: str  # what they are called
    steps: dict[str, list[int]]

    def loss(self, recipe: str) -> float:
        """The mean over the recipe's runs."""
        return float(self.losses[recipe].mean(0).sum() / self.weights.sum())

    def difference(self, first: str, second: str) -> Difference:
        return difference(self.losses[first], self.losses[second], self.weights)


def measure(recipes: dict[str, list[Run]], best: bool, set_name: str | None) -> Measured:
    """The losses of `recipes` on the same pieces of text, of validation set `set_name`, else the first. Raises
    UserError if nats are missing, or if the runs were not evaluated on the same text."""
    found = {name: [run.block_nats(best, set_name) for run in runs] for name, runs in recipes.items()}
    steps = {name: [run.evaluation(best).step or 0 for run in runs] for name, runs in recipes.items()}
    all_found = [nats for several in found.values() for nats in several]
    folders = [run.folder for runs in recipes.values() for run in runs]
    first = all_found[0]
    for folder, nats in zip(folders, all_found, strict=True):
        if not np.isfinite(nats.nats).all():
            raise UserError(f"{folder}: the loss of some blocks is not finite")
    others = [folder for folder, nats in zip(folders, all_found, strict=True) if nats.blocks != first.blocks]
    if not others:
        if np.count_nonzero(first.targets) < 2:
            raise UserError(f"{folders[0]} was evaluated on fewer than two blocks with targets: an interval needs two")
        losses = {name: np.stack([nats.nats for nats in several]) for name, several in found.items()}
        return Measured(losses, first.targets, "nats per token", "blocks", steps)
    if any(nats.text is None or nats.text != first.text for nats in all_found):
        raise UserError(
            f"{folders[0]} and {others[0]} were evaluated on different tokens: the text, the tokenizer, block_size or "
            "another setting of the evaluation differs. Losses per token of different tokens cannot be compared. Where "
            "the text is the same, evaluate both with --named_perplexities: then they are compared in bits per byte"
        )
    # same text, different tokens: as many pieces as the fewest blocks, of equal numbers of bytes
    num_bytes = min(int(nats.num_bytes.sum()) for nats in all_found if nats.num_bytes is not None)
    ends = np.linspace(0, num_bytes, min(len(nats.nats) for nats in all_found) + 1)
    losses = {name: np.stack([_bits_between(ends, nats) for nats in several]) for name, several in found.items()}
    return Measured(losses, np.diff(ends), "bits per byte", "pieces of text", steps)


def _bits_between(ends: np.ndarray, nats: BlockNats) -> np.ndarray:
    """[n] bits of the text between n + 1 `ends`, in bytes. A block's bits are spread evenly over its bytes."""
    assert nats.num_bytes is not None and nats.text_nats is not None
    byte_ends = np.concatenate([[0], nats.num_bytes.cumsum()])
    bits = np.concatenate([[0], nats.text_nats.astype(np.float64).cumsum()]) / math.log(2)
    return np.diff(np.interp(ends, byte_ends, bits))


def in_words(measured: Measured, first: str, second: str) -> str:
    """Sentences: how the second recipe's loss differs from the first's, and what makes the interval wide."""
    found = measured.difference(first, second)
    way = "lower" if found.value < 0 else "higher"
    percent = 100 * (found.share_lower if found.value < 0 else found.share_higher)
    claim = (
        f"{second} is {way} than {first} by {amount(found)} {measured.unit} (95 % interval); {way} in {percent:.0f} % "
        f"of {np.count_nonzero(measured.weights):,} {measured.pieces}."
    )
    if not found.is_clear:
        claim = f"No difference can be told from these: {claim}"
    if found.from_seeds is None:
        return (
            f"{claim}\nThis is about these two models. Another seed may give another answer: train each recipe with "
            "several seeds, and name the folders by them, such as a-1 a-2 a-3."
        )
    digits = decimals(found)
    narrower = "More seeds" if found.from_seeds > found.from_text else "More validation text"
    return (
        f"{claim}\nThe seeds alone give +- {found.from_seeds:.{digits}f}, "
        f"the text alone +- {found.from_text:.{digits}f}. {narrower} would narrow the interval most."
    )


def loss_table(measured: Measured) -> str:
    """A line for each recipe, lowest loss first, with its distance to the best."""
    names = sorted(measured.losses, key=measured.loss)
    width = min(max(map(len, names)), NAME_COLUMNS)
    lines = [f"{'':<{width}}  runs      step     loss  spread  above the lowest ({measured.unit})"]
    for name in names:
        of_runs = measured.losses[name].sum(1) / measured.weights.sum()
        spread = f"{of_runs.std(ddof=1):.4f}" if len(of_runs) > 1 else "-"
        found = measured.difference(names[0], name)
        above = "" if name == names[0] else amount(found) + ("" if found.is_clear else ", not told apart")
        cut = name if len(name) <= width else "..." + name[3 - width :]
        steps = f"{max(measured.steps[name]):,}"
        lines.append(
            f"{cut:<{width}}  {len(of_runs):>4}  {steps:>8}  {measured.loss(name):>7.4f}  {spread:>6}  {above}".rstrip()
        )
    return "\n".join(lines)


def amount(found: Difference) -> str:
    """The difference without its sign, +- half its interval, which gets two digits."""
    digits = decimals(found)
    return f"{abs(found.value):.{digits}f} +- {found.half_width:.{digits}f}"


def decimals(found: Difference) -> int:
    return min(6, max(2, 1 - math.floor(math.log10(found.half_width)))) if found.half_width else 4
