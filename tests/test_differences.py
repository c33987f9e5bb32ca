"""Whether one recipe is better than another: the interval covers the truth as often as it says, and the words fit."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import shows
from matplotlib.image import imread

from train_loop.compare import main
from train_loop.compare.intervals import difference, half_width, t_quantile
from train_loop.report.evaluations import BLOCK_NATS, BlockNats, Kept, read_block_nats, write_block_nats

TARGETS = 127  # of a block


def neighbours_alike(generator, shape, correlation):
    """Noise of variance 1 whose last axis is autoregressive: blocks of one document are alike."""
    noise = generator.standard_normal(shape)
    for i in range(1, shape[-1]):
        noise[..., i] = correlation * noise[..., i - 1] + (1 - correlation**2) ** 0.5 * noise[..., i]
    return noise


def recipe(generator, shape, loss=3.0, seeds=0.0, own=0.3, text=(0.0,), correlation=0.5):
    """Nats of `shape`, [..., S, n]. `seeds`: standard deviation of a run's loss; `own`: of a run's block; `text`:
    [..., n], what blocks have beyond the loss in all runs of the recipe."""
    losses = loss + seeds * generator.standard_normal((*shape[:-1], 1))
    losses = losses + own * neighbours_alike(generator, shape, correlation)
    return TARGETS * (losses + np.asarray(text)[..., None, :])


def share(covers):
    return sum(covers) / len(covers)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
def test_the_interval_of_two_runs_covers_the_true_difference_as_often_as_it_says(correlation):
    """2,000 pairs: the share has a standard error of 0.5 %. If blocks are taken for independent it is less."""
    generator, shape = np.random.default_rng(0), (2000, 1, 240)
    hard = neighbours_alike(generator, (2000, 240), correlation)  # some blocks are harder than others, for both
    pairs = list(zip(*(recipe(generator, shape, loss, 0, 0.3, hard, correlation) for loss in (3.0, 2.9)), strict=True))
    found = [difference(*pair, np.full(240, TARGETS)) for pair in pairs]
    assert 0.93 <= share([abs(one.value + 0.1) <= one.half_width for one in found]) <= 0.97
    per_block = [(second - first)[0] / TARGETS for first, second in pairs]
    naive = share([abs(each.mean() + 0.1) <= 1.96 * each.std(ddof=1) / 240**0.5 for each in per_block])
    assert naive < 0.90 if correlation else naive > 0.93


@pytest.mark.parametrize(
    "num_runs, seeds, of_text, most",
    [
        ((3, 3), 0.02, 0.0, 0.99),
        ((3, 3), 0.02, 0.3, 0.97),
        ((5, 4), 0.1, 0.0, 0.98),
        ((10, 10), 0.02, 0.0, 0.97),
        ((3, 1), 0.05, 0.1, 0.99),
    ],
)
def test_the_interval_over_seeds_covers_the_true_difference(num_runs, seeds, of_text, most):
    """`of_text`: how much the recipes differ from block to block, in all runs. With few runs the interval is rather too
    wide than too narrow."""
    generator = np.random.default_rng(1)
    first, second = (
        recipe(generator, (1000, num, 240), loss, seeds, text=of_text * neighbours_alike(generator, (1000, 240), 0.5))
        for num, loss in zip(num_runs, (3.0, 3.1), strict=True)
    )
    found = [difference(*pair, np.full(240, TARGETS)) for pair in zip(first, second, strict=True)]
    assert 0.93 <= share([abs(one.value - 0.1) <= one.half_width for one in found]) <= most
    if seeds >= 0.05:  # the text alone is too sure of itself where seeds differ
        means = [nats.mean(1, keepdims=True) for nats in (first, second)]
        of_text = [difference(*pair, np.full(240, TARGETS)) for pair in zip(*means, strict=True)]
        assert share([abs(one.value - 0.1) <= one.half_width for one in of_text]) < 0.8


def test_blocks_with_few_targets_count_for_few():
    targets = np.array([100, 1, 100, 3, 50, 50, 2, 70, 100, 1, 9, 80])
    first, second = 3.0 * targets, 2.5 * targets
    found = difference(first[None], second[None], targets)
    assert found.value == pytest.approx(-0.5) and found.half_width == pytest.approx(0, abs=1e-12)
    assert found.share_lower == 1 and found.from_seeds is None


def test_blocks_without_targets_count_for_nothing():
    generator = np.random.default_rng(11)
    pair, some = recipe(generator, (2, 1, 240)), np.arange(240) < 100
    alone = difference(*(nats[:, some] for nats in pair), np.full(100, TARGETS))
    assert difference(*(nats * some for nats in pair), TARGETS * some) == alone
    assert alone.share_lower + alone.share_higher == 1


def test_the_interval_does_not_jump_where_the_variances_change_a_little():
    """Of two seeds each: the degrees of freedom go from 1 to 2."""
    widths = [half_width([(0.01, 9), (1.0, 1), (0.01 * i, 1)]) for i in range(101)]
    assert all(abs(after / before - 1) < 0.03 for before, after in itertools.pairwise(widths))
    assert half_width([(1.0, 1)]) == pytest.approx(12.706, abs=5e-4)
    assert half_width([(0.5, 1), (0.5, 1)]) == pytest.approx(4.303, abs=5e-4)
    assert half_width([(1e-200, 9), (1e-300, 1)]) == pytest.approx(2.262e-100, rel=1e-3)


@pytest.mark.parametrize("num_runs", [(2, 1), (2, 2), (3, 3)])
def test_neither_the_seeds_nor_the_text_give_more_than_both(num_runs):
    generator = np.random.default_rng(12)
    for _ in range(20):
        found = difference(*(recipe(generator, (num, 240), seeds=0.03) for num in num_runs), np.full(240, TARGETS))
        assert found.from_seeds**2 + found.from_text**2 == pytest.approx(found.half_width**2)


def test_the_quantiles_are_those_of_the_tables():
    """Abramowitz and Stegun, table 26.10."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 18: 2.101, 29: 2.045, 120: 1.980}
    for freedom, value in table.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=5e-4)


@pytest.fixture
def runs(tmp_path):
    """A function that makes folders as runs leave them, {name: (seed, nats [n] of blocks, settings)}."""

    def make(of_runs, blocks="the same", targets=None, **fields):
        for name, (seed, nats, settings) in of_runs.items():
            folder = tmp_path / name
            folder.mkdir()
            of_blocks = np.full(len(nats), TARGETS) if targets is None else targets
            found = BlockNats(
                nats.astype(np.float32), of_blocks.astype(np.int32), settings.pop("blocks", blocks), **fields
            )
            write_block_nats(folder, {"last": Kept(40, {"validation": found})})
            loss = float(nats.sum() / of_blocks.sum())
            lines = [{"step": 20, "loss": loss}, {"step": 40, "eval_loss": loss, "perplexity": float(np.exp(loss))}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "train_config.yaml").write_text(yaml.safe_dump({"seed": seed, "learning_rate": 1e-3, **settings}))
        return [str(tmp_path / name) for name in of_runs]

    return make


def one(generator, loss, **values):
    return recipe(generator, (1, 240), loss, **values)[0]


def said(folders, capsys, *more):
    """What the command says, without the table of settings, on one line."""
    main([*folders, *more])
    return " ".join(" ".join(capsys.readouterr()).split())


def test_a_clear_difference_is_said_in_words_with_its_interval(runs, capsys):
    generator = np.random.default_rng(2)
    folders = runs({"a": (1, one(generator, 3.0), {}), "b": (1, one(generator, 2.8), {})})
    output = said(folders, capsys)
    found = difference(*(nats[None] for nats in read_nats(folders)), np.full(240, TARGETS))
    claim = (
        f"b is lower than a by {-found.value:.3f} +- {found.half_width:.3f} nats per token (95 % interval); lower in "
    )
    assert claim + f"{100 * found.share_lower:.0f} % of 240 blocks." in output and "No difference" not in output
    assert "train each recipe with several seeds" in output
    # and the other way round
    assert "a is higher than b by" in said(folders[::-1], capsys)


def read_nats(folders):
    from safetensors.numpy import load_file

    return [load_file(f"{folder}/evaluations/block_nats.safetensors")["validation/last/nats"] for folder in folders]


def test_a_difference_within_the_interval_is_none_that_can_be_told(runs, capsys):
    generator = np.random.default_rng(3)
    output = said(runs({"a": (1, one(generator, 3.0), {}), "b": (1, one(generator, 3.001), {})}), capsys)
    assert "No difference can be told from these: b is" in output


def test_seeds_of_one_recipe_are_found_by_their_settings_and_names(runs, capsys):
    generator = np.random.default_rng(4)
    of_runs = {}
    for seed in (1, 2, 3):
        for name, loss in (("a", 3.0), ("b", 2.9)):  # a change in the code: it is in no setting
            of_runs[f"{name}-{seed}"] = (seed, one(generator, loss, seeds=0.02, own=0.01), {})
    output = said(runs(of_runs), capsys)
    assert "b-* is lower than a-* by" in output and "More seeds would narrow the interval most" in output
    assert "train each recipe with several seeds" not in output


def test_runs_with_other_settings_or_without_the_seed_in_their_name_are_recipes_of_their_own(runs, capsys):
    generator = np.random.default_rng(5)
    of_runs = {
        "a-1": (1, one(generator, 3.0), {}),
        "a-2": (2, one(generator, 3.0), {"learning_rate": 2e-3}),
        "c": (3, one(generator, 2.9), {}),
        "e-21": (1, one(generator, 2.6), {}),  # 21 is not the seed
        "e-22": (2, one(generator, 2.7), {}),
    }
    main(runs(of_runs))
    table = capsys.readouterr().out.split("above the lowest")[1]
    assert [line.split()[:2] for line in table.splitlines()[1:6]] == [
        *(["e-21", "1"], ["e-22", "1"], ["c", "1"]),
        *([name, "1"] for name in sorted(("a-1", "a-2"), key=lambda name: of_runs[name][1].sum())),
    ]


def test_many_recipes_are_a_table_sorted_by_loss_with_the_interval_to_the_best(runs, capsys):
    generator = np.random.default_rng(6)
    losses = {"slow": 3.4, "good": 2.9, "better": 2.9005, "bad": 5.0}
    hard = neighbours_alike(generator, (240,), 0.5)
    of_runs = {
        f"{name}-{seed}": (seed, one(generator, loss, seeds=0.001, own=0.02, text=hard), {"learning_rate": loss})
        for name, loss in losses.items()
        for seed in (1, 2, 3, 4)
    }
    main(runs(of_runs))
    output = capsys.readouterr().out
    rows = [line for line in output.split("above the lowest")[1].splitlines() if "-*" in line]
    assert [row.split()[0] for row in rows][2:] == ["slow-*", "bad-*"]
    assert "+-" not in rows[0] and "not told apart" in rows[1]
    assert all("+-" in row and "not told" not in row for row in rows[2:])
    assert [row.split()[1] for row in rows] == ["4"] * 4
    assert max(map(len, output.splitlines()[:-1])) <= 80


def test_other_blocks_are_refused_in_a_sentence(runs, capsys):
    generator = np.random.default_rng(7)
    folders = runs({"a": (1, one(generator, 3.0), {}), "b": (1, one(generator, 2.8), {"blocks": "others"})})
    output = said(folders, capsys)
    assert "were evaluated on different tokens" in output and "--named_perplexities" in output
    assert "is lower" not in output and "lowest validation loss" in output


def test_other_tokens_of_the_same_text_are_compared_in_bits_per_byte(runs, capsys):
    """Two runs on the same text, with blocks of 400 and of 300 bytes; the second covers less of the text's end. A hard
    piece of text is hard for both."""
    generator = np.random.default_rng(10)
    hard = 1 + 0.2 * neighbours_alike(generator, (96_000,), 0.99)  # nats of a byte
    folders = []
    for name, size, factor in (("coarse", 400, 1.0), ("fine", 300, 1.01)):
        num_blocks = 96_000 // size - (name == "fine")
        text_nats = factor * hard[: num_blocks * size].reshape(-1, size).sum(1)
        num_bytes = np.full(num_blocks, size, dtype=np.int32)
        fields = {"text": "the same", "text_nats": text_nats.astype(np.float32), "num_bytes": num_bytes}
        folders += runs({name: (1, text_nats, {"block_size": size // 4, "blocks": name})}, **fields)
    output = said(folders, capsys)
    found = re.search(r"fine is higher than coarse by (\S+) \+- (\S+) bits per byte", output)
    assert float(found[1]) == pytest.approx(0.01 * hard.mean() / np.log(2), abs=5e-4) and float(found[2]) < 2e-3
    assert "of 240 pieces of text" in output
    other = runs({"else": (1, text_nats, {"blocks": "else"})}, **fields | {"text": "another"})
    assert "were evaluated on different tokens" in said([folders[0], *other], capsys)


def test_a_run_without_nats_and_a_set_that_there_is_not_are_sentences(runs, capsys, tmp_path):
    generator = np.random.default_rng(8)
    folders = runs({"a": (1, one(generator, 3.0), {}), "b": (1, one(generator, 2.8), {})})
    assert "has no validation set mine; it has validation" in said(folders, capsys, "--on=mine")
    assert "does not have the nats of its best evaluation" in said(folders, capsys, "--best")
    (tmp_path / "b" / "evaluations" / "block_nats.safetensors").unlink()
    assert "does not have the nats of its last evaluation" in said(folders, capsys)


def test_blocks_without_targets_are_not_counted_in_the_sentence(runs, capsys):
    some = np.arange(240) < 100
    generator = np.random.default_rng(13)
    nats = {name: one(generator, loss) * some for name, loss in (("a", 3.0), ("b", 1.0))}
    folders = runs({name: (1, of_run, {}) for name, of_run in nats.items()}, targets=TARGETS * some)
    assert "lower in 100 % of 100 blocks." in said(folders, capsys)
    only = np.arange(240) == 0
    of_runs = {name: (1, of_run * only, {}) for name, of_run in zip("cd", nats.values(), strict=True)}
    assert "on fewer than two blocks with targets" in said(runs(of_runs, targets=TARGETS * only), capsys)


def test_the_table_and_the_picture_are_of_the_set_that_is_asked_for(runs, capsys, tmp_path, monkeypatch):
    from matplotlib import pyplot

    generator = np.random.default_rng(14)
    folders = runs({"x": (1, one(generator, 3.0), {}), "y": (1, one(generator, 2.8), {})})
    for folder in map(Path, folders):
        sets = read_block_nats(folder / BLOCK_NATS)["last"].sets
        write_block_nats(folder, {"last": Kept(40, {**sets, "b": sets["validation"]})})
        lines = [{"step": 10 * i, "eval_loss": 3.0, "perplexity": 20.1, "eval_b_loss": 2.0 + 0.25 * i} for i in (1, 2)]
        lines = [line | {"eval_b_perplexity": 9.49} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # the figure can be looked at
    output = said(folders, capsys, "--on=b")
    right = pyplot.gcf().axes[1]
    monkeypatch.undo()
    pyplot.close("all")
    assert "lowest loss on b 2.2500 2.2500 its perplexity 9.49 9.49 at step 10 10" in output
    assert right.lines[0].get_ydata().tolist() == [2.25, 2.5] and "loss on b" in right.get_ylabel()
    assert "lowest loss on validation 3.0000" in said(folders, capsys, "--on=validation")
    assert "lowest validation loss 3.0000" in said(folders, capsys)


def test_the_picture_shows_the_difference_and_its_interval(runs, capsys, tmp_path):
    generator = np.random.default_rng(9)
    folders = runs({"a": (1, one(generator, 3.0), {}), "b": (1, one(generator, 2.8), {"learning_rate": 2e-3})})
    main([*folders, f"--output={tmp_path}/with.png"])
    main([folders[0], f"--output={tmp_path}/without.png"])
    picture = imread(tmp_path / "with.png")
    assert shows(picture[int(0.72 * len(picture)) :], "tab:blue")  # the interval of the one that is not the best
    assert len(picture) > len(imread(tmp_path / "without.png"))


def test_long_names_neither_cover_the_curves_nor_narrow_them(runs, capsys, tmp_path, monkeypatch):
    from matplotlib import pyplot

    names = ["a-recipe-with-a-name-that-is-really-long", "another-recipe-with-a-name-that-is-even-longer"]
    folders = runs({name: (1, np.full(20, 3.0 + i), {"learning_rate": 1e-3 * i}) for i, name in enumerate(names)})
    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # the figure can be looked at
    main(folders)
    figure = pyplot.gcf()
    monkeypatch.undo()
    pyplot.close("all")
    left, right, below = (axes.get_window_extent() for axes in figure.axes)
    assert figure.axes[1].get_legend().get_window_extent().y0 >= right.y1
    assert left.width > 0.4 * figure.bbox.width and below.y1 < left.y0


def test_the_curve_shows_the_band_of_a_recipes_seeds(runs, capsys, tmp_path, monkeypatch):
    """At the steps that all of them have: the mean, from the lowest to the highest."""
    from matplotlib import pyplot

    losses = {1: {10: 3.4, 20: 3.1, 30: 3.0}, 2: {10: 3.6, 30: 3.2}, 3: {10: 3.5, 30: 3.4}}
    folders = runs({f"a-{seed}": (seed, np.full(20, 3.0), {}) for seed in losses})
    for folder, of_seed in zip(folders, losses.values(), strict=True):
        lines = [{"step": step, "eval_loss": loss, "perplexity": 1.0} for step, loss in of_seed.items()]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # the figure can be looked at
    main(folders)
    right = pyplot.gcf().axes[1]
    monkeypatch.undo()
    pyplot.close("all")
    (line,), (band,) = right.lines, right.collections
    assert line.get_xydata().tolist() == [[10, 3.5], [30, pytest.approx(3.2)]]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(10, 3.4), (10, 3.6), (30, 3.0), (30, 3.4)} <= corners
    assert "mean of 3 runs" in right.get_legend().get_texts()[0].get_text()
