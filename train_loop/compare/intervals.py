"""How sure a difference of two losses is: 95 % intervals over the text, and over seeds.

S: runs of a recipe, which differ in the seed alone, n: blocks of the validation set, in the order of the text,
G: groups of neighbouring blocks.

Over the text: the blocks of one document are similar, so n blocks carry less information than n independent ones. The
blocks form ten groups of neighbours, and the groups' means count as independent: Student's t with nine degrees of
freedom. Simulation studies call these batch means. More than 10 to 30 groups would make the interval little narrower,
and neighbouring groups would depend on each other (Schmeiser, Batch size effects in the analysis of simulation output,
Operations Research 30, 1982). Ten groups separate documents best.

Over seeds: the variance of the runs' losses, with Welch's and Satterthwaite's degrees of freedom (Welch, The
generalization of Student's problem, Biometrika 34, 1947). All runs see the same text: runs and groups are two crossed
factors. Their interaction is part of both variances, and is counted once (analysis of variance with two factors;
Searle, Casella and McCulloch, Variance Components, 1992, chapter 4).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

NUM_GROUPS = 10


@dataclass(frozen=True)
class Difference:
    """How much higher the second recipe's loss is than the first's, in nats per token, and half its 95 % interval.
    half_width^2 = from_text^2 + from_seeds^2. `from_seeds` is None if each recipe has one run."""

    value: float
    half_width: float
    from_text: float
    from_seeds: float | None
    share_lower: float  # of the blocks with targets: where the second is lower
    share_higher: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.value) > self.half_width


def difference(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> Difference:
    """The difference of two recipes from their nats, [S, n] each, on the same blocks. `weights` [n]: their targets.

    If both recipes have one run, the interval is for these two models and says nothing about other seeds. If only one
    has one run, its seeds are assumed to vary like the other's. Blocks without targets are left out; at least two with
    targets are needed.
    """
    has_targets = np.asarray(weights) > 0
    runs = [np.asarray(nats, dtype=np.float64)[:, has_targets] for nats in (first, second)]
    weights = np.asarray(weights, dtype=np.float64)[has_targets]
    total, num_groups = weights.sum(), min(NUM_GROUPS, len(weights))
    firsts = np.arange(num_groups) * len(weights) // num_groups
    of_groups = np.add.reduceat(weights, firsts)  # [G]
    per_block = runs[1].mean(0) - runs[0].mean(0)
    value = per_block.sum() / total

    residuals = np.add.reduceat(per_block, firsts) - value * of_groups
    text = num_groups / (num_groups - 1) * (residuals**2).sum() / total**2

    spreads, interaction = [], 0.0  # (variance of a run's loss, number of runs), of the recipes with several
    for nats in runs:
        num_runs, losses = len(nats), nats.sum(1) / total
        if num_runs > 1:
            spreads.append((losses.var(ddof=1), num_runs))
            groups = np.add.reduceat(nats, firsts, axis=1)
            left = groups - groups.mean(0) - (losses - losses.mean())[:, None] * of_groups
            freedom = (num_runs - 1) * (num_groups - 1)
            interaction += num_groups / (num_runs * freedom) * (left**2).sum() / total**2
    text_alone = max(text - interaction, 0.0) if spreads else text
    if not spreads:
        parts = [(text, num_groups - 1)]
    elif len(spreads) == 2:
        parts = [(text_alone, num_groups - 1), *((variance / num, num - 1) for variance, num in spreads)]
    else:
        variance, num = spreads[0]
        parts = [(text_alone, num_groups - 1), (variance * (1 + 1 / num), num - 1)]
    combined, variance = half_width(parts), sum(part for part, _ in parts)
    share = float(parts[0][0] / variance) if variance else 0.0  # of the text, of the variance
    return Difference(
        float(value),
        combined,
        combined * math.sqrt(share),
        combined * math.sqrt(1 - share) if spreads else None,
        float((per_block < 0).mean()),
        float((per_block > 0).mean()),
    )


def half_width(parts: list[tuple[float, int]]) -> float:
    """Half of a 95 % interval whose variance is the sum of `parts`, (variance, degrees of freedom) each, with the
    degrees of freedom of Welch and Satterthwaite.

    These are rarely integers. Between integers the quantile is interpolated in their inverse: rounding 1.99 down would
    make the interval three times as wide.
    """
    variance = sum(part for part, _ in parts)
    if not variance:
        return 0.0
    inverse = sum((part / variance) ** 2 / of_part for part, of_part in parts)  # of the degrees of freedom
    below = max(1, int(1 / inverse))
    quantile = np.interp(inverse, [1 / (below + 1), 1 / below], [t_quantile(below + 1), t_quantile(below)])
    return float(quantile * math.sqrt(variance))


@functools.cache
def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom, by bisection of its distribution function: the
    finite sums 26.7.3 and 26.7.4 of Abramowitz and Stegun, Handbook of Mathematical Functions."""

    def distribution(t: float) -> float:
        theta = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(theta), math.cos(theta)
        term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
        for k in range(freedom % 2, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + sine * total) if freedom % 2 else sine * total
        return 0.5 + inside / 2

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < probability else (low, middle)
    return high
