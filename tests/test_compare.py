"""Runs beside each other: `python -m train_loop.compare`."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import lines_of, shows
from matplotlib.image import imread

from train_loop.compare import main
from train_loop.compare.picture import draw
from train_loop.compare.runs import Run, short_names
from train_loop.report.curve import draw_run, read_lines, smooth


def test_the_table_has_what_differs_and_the_best_of_each_run(watched, tmp_path, capsys):
    folders = [watched["folder"] / name for name in ("alone", "plain")]
    main([*map(str, folders), "--output", str(tmp_path / "both.png")])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines()[:-1])) <= 80
    rows = {line[:30].split("  ")[0]: line.split("  ")[1:] for line in output.splitlines() if line}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in rows.items()}
    assert cells["load_best_model_at_end"] == ["true", "false"] and cells["early_stopping_patience"] == ["6", "-"]
    assert cells["steps"] == ["24", "40"]
    assert not {"learning_rate", "output_dir", "seed"} & cells.keys()
    for index, folder in enumerate(folders):
        best = min((line for line in lines_of(folder) if line.get("eval_loss")), key=lambda line: line["eval_loss"])
        assert cells["its perplexity"][index] == f"{best['perplexity']:.2f}"
        assert cells["at step"][index] == str(best["step"])


@pytest.fixture
def runs(watched, tmp_path):
    """Seven runs with long names, two of them the same."""
    folders = []
    for index in range(7):
        folder = tmp_path / f"sweep-{index // 2}" / f"a-run-with-quite-a-long-name-{index % 2}"
        folder.mkdir(parents=True)
        shutil.copy(watched["folder"] / "plain" / "metrics.jsonl", folder)
        settings = yaml.safe_load((watched["folder"] / "plain" / "train_config.yaml").read_text())
        settings["learning_rate"] = index * 1e-4
        (folder / "train_config.yaml").write_text(yaml.safe_dump(settings))
        folders.append(folder)
    return folders


def test_many_runs_stay_within_eighty_columns_and_are_told_apart(runs, capsys):
    main([*map(str, runs)])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines()[:-1])) <= 80
    assert len(set(short_names(runs))) == 7
    assert all(f"{index * 1e-4}" in output for index in range(7))
    assert (runs[0].parent.parent / "comparison.png").is_file()


def test_the_picture_shows_training_and_validation_losses_of_each_run(runs, tmp_path):
    lines = lines_of(runs[1])
    for line in lines:  # apart from the first run's, which would lie under them
        line |= {name: line[name] + 1 for name in ("loss", "eval_loss") if name in line}
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([str(runs[0]), str(runs[1]), "--output", str(tmp_path / "both.png")])
    left, right = np.array_split(imread(tmp_path / "both.png"), 2, axis=1)
    assert all(shows(half, colour) for half in (left, right) for colour in ("tab:blue", "tab:orange"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "metrics.jsonl cannot be read: No such file"),
        (lambda path: path.write_text(""), "metrics.jsonl has no line of metrics"),
        (lambda path: path.write_text("17\n"), "metrics.jsonl has no line of metrics"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "metrics.jsonl cannot be read: it is not text"),
        (lambda path: (path.parent / "train_config.yaml").unlink(), "train_config.yaml cannot be read"),
    ],
)
def test_a_folder_that_is_no_run_is_one_sentence(damage, message, runs, capsys):
    damage(runs[0] / "metrics.jsonl")
    with pytest.raises(SystemExit) as error:
        main([*map(str, runs)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_line_is_left_out_with_a_warning(runs, capsys):
    path = runs[0] / "metrics.jsonl"
    whole, text = read_lines(path), path.read_text()
    path.write_text(text.replace("\n", "\n[1\n", 1))
    assert read_lines(path) == whole
    warning = f"warning: {path} is damaged: line 2 is not a line of metrics and is left out\n"
    assert capsys.readouterr().err == warning


def test_a_line_that_is_still_being_written_is_left_out(runs):
    whole = read_lines(runs[0] / "metrics.jsonl")
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps(whole[-1])[:20])
    assert read_lines(runs[0] / "metrics.jsonl") == whole


def test_smoothing_keeps_a_line_straight_where_it_has_neighbours_on_both_sides():
    values = smooth([3.0] * 50)
    assert values == pytest.approx([3.0] * 50)
    assert smooth([float(i) for i in range(100)])[20:80] == pytest.approx(range(20, 80))


@pytest.mark.parametrize("draw", [draw_run, lambda lines, path: draw({"one": [Run(path, {}, lines, {})]}, None, path)])
def test_the_thickest_line_of_the_training_losses_is_smooth(draw, tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # the figure can be looked at
    draw([{"step": step, "loss": 3.0 + 0.5 * (-1) ** step} for step in range(1, 41)], tmp_path / "curve.png")
    thickest = max(pyplot.gcf().axes[0].lines, key=lambda line: line.get_linewidth() * len(line.get_ydata()))
    monkeypatch.undo()
    pyplot.close("all")
    assert thickest.get_ydata()[3:-3] == pytest.approx([3.0] * 34, abs=0.05)
