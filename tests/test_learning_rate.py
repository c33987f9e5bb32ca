"""The learning rate: a function of the optimizer step, the same for a run that is resumed."""

import json
import re
import warnings

import pytest
import torch
import transformers
from conftest import ROOT, TINY, assert_same_run, copy_until, lines_of

from train_loop.checkpoint.identity import differences
from train_loop.main import main
from train_loop.optim import build_scheduler, lr_factor
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import SCHEDULES, Settings

pytestmark = pytest.mark.quick

WORDS = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"]


def rates(settings, num_steps, first=0, theirs=None):
    """The learning rates of the steps from `first` on, from our scheduler or, with its name and more, transformers'."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=settings.learning_rate)
    if theirs:
        name, options = theirs
        scheduler = transformers.get_scheduler(name, optimizer, settings.num_warmup_steps, num_steps, options)
    else:
        scheduler = build_scheduler(optimizer, settings, num_steps, first)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of an order of calls that it does not know
        for _ in range(first, num_steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return found


@pytest.mark.parametrize("num_warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "constant_with_warmup", "constant"])
def test_the_rate_of_every_step_is_transformers_bit_for_bit(schedule, num_warmup_steps):
    settings = Settings(learning_rate=3e-4, lr_scheduler_type=schedule, num_warmup_steps=num_warmup_steps)
    said = f"the learning rates of the schedule {schedule} are not those of transformers any more: look at lr_factor"
    assert rates(settings, 41) == rates(settings, 41, theirs=(schedule, None)), said


@pytest.mark.parametrize(
    "schedule, kwargs, name, options",
    [
        ("polynomial", None, "polynomial", None),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}, "polynomial", {"power": 2.0, "lr_end": 1e-5}),
        ("cosine", {"num_cycles": 1.5}, "cosine", {"num_cycles": 1.5}),
        ("cosine", {"min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_restarts", {"num_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ("wsd", None, "warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "linear"}),
        ("wsd", {"decay_ratio": 0.4}, "warmup_stable_decay", {"num_decay_steps": 17, "decay_type": "linear"}),
    ],
)
def test_parameters_of_a_schedule_mean_what_they_mean_in_transformers(schedule, kwargs, name, options):
    """Tolerance: the same formula written otherwise, in double precision."""
    settings = Settings(learning_rate=3e-4, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs, num_warmup_steps=4)
    assert rates(settings, 41) == pytest.approx(rates(settings, 41, theirs=(name, options)), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "wsd"])
def test_the_rate_ends_at_the_lowest_one(schedule):
    lowest = Settings(lr_scheduler_type=schedule, lr_scheduler_kwargs={"min_lr_ratio": 0.2}, num_warmup_steps=3)
    factors = [lr_factor(step, 20, lowest) for step in range(21)]
    assert factors[0] == 0.0 and factors[3] == 1.0 == max(factors) and min(factors[3:]) == factors[20] == 0.2


def test_warm_up_may_be_a_share_of_the_steps():
    share, steps = Settings(num_warmup_steps=0.25), Settings(num_warmup_steps=6)
    assert rates(share, 21) == rates(steps, 21)


def test_a_recipe_with_both_names_of_the_warm_up_is_read_if_one_is_zero(tmp_path):
    """An older version had two settings, and its train_config.yaml has both."""
    for steps, ratio, wanted in ((5, 0.0, 5), (0, 0.1, 0.1), (0, 0.0, 0)):
        (tmp_path / "r.yaml").write_text(f"num_warmup_steps: {steps}\nwarmup_ratio: {ratio}\n")
        assert read_settings([*WORDS, f"--config={tmp_path}/r.yaml"]).num_warmup_steps == wanted


def test_a_decay_longer_than_what_the_warm_up_leaves_begins_after_it():
    settings = Settings(lr_scheduler_type="wsd", lr_scheduler_kwargs={"decay_ratio": 0.9}, num_warmup_steps=4)
    assert [lr_factor(step, 8, settings) for step in range(3, 9)] == [0.75, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "constant"])
def test_from_any_step_on_the_rates_are_those_of_a_run_that_never_stopped(schedule):
    settings = Settings(lr_scheduler_type=schedule, num_warmup_steps=5)
    whole = rates(settings, 30)
    for first in range(1, 30):
        assert rates(settings, 30, first) == whole[first:], f"a run resumed at step {first} has other learning rates"


def test_groups_with_rates_of_their_own_keep_their_ratio():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 1e-2}, {"params": parameters[1:]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    build_scheduler(optimizer, Settings(lr_scheduler_type="cosine"), 10, step=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"])


def test_parameters_come_from_a_recipe_or_as_json_and_are_written_back(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlr_scheduler_type: cosine\n"
        "lr_scheduler_kwargs: {min_lr_ratio: 1e-1, num_cycles: 2}\n"
    )
    settings = read_settings(["--config", str(recipe)])
    assert settings.lr_scheduler_kwargs == {"min_lr_ratio": 0.1, "num_cycles": 2.0}
    words = [*WORDS, "--lr_scheduler_type=cosine", '--lr_scheduler_kwargs={"min_lr_ratio": 0.1, "num_cycles": 2}']
    assert read_settings(words) == settings
    with pytest.raises(SystemExit):
        read_settings([*words, "--print_config"])
    recipe.write_text(capsys.readouterr().out)
    assert read_settings(["--config", str(recipe)]) == settings


def test_the_recipes_page_lists_the_schedules_with_their_parameters():
    readme = (ROOT / "train_loop" / "recipes" / "README.md").read_text(encoding="utf-8").replace("`", "")
    for schedule, parameters in SCHEDULES.items():
        row = next(line for line in readme.splitlines() if re.match(rf"\| .*\b{schedule}\b.* \|", line))
        listed = re.findall(r"(\w+) ([\d.e-]+)", row.split("|")[2])
        assert {name: float(value) for name, value in listed} == parameters


@pytest.mark.parametrize(
    "schedule, words, said",
    [
        ("cosine", ['--lr_scheduler_kwargs={"power": 2}'], "has no power; it takes num_cycles, min_lr_ratio"),
        ("constant", ['--lr_scheduler_kwargs={"power": 2}'], "has no power; it takes none"),
        ("linear", ['--lr_scheduler_kwargs={"min_lr_ratio": 1.5}'], "is 1.5, but must be from 0 to 1"),
        ("wsd", ['--lr_scheduler_kwargs={"decay_ratio": 0}'], "is 0.0, but must be above 0"),
        ("polynomial", ["--learning_rate=1e-8"], "lr_end of lr_scheduler_type polynomial is 1e-07, but must be at"),
        (
            "cosine",
            ["--lr_scheduler_kwargs=num_cycles=2"],
            "a mapping of names to numbers, on the command line as JSON",
        ),
        ("cosine", ['--lr_scheduler_kwargs={"num_cycles": "x"}'], "a mapping of names to numbers"),
        ("cosine", ["--lr_scheduler_kwargs=" + "[" * 100_000], "a mapping of names to numbers"),
        ("linear", ["--warmup_ratio=1"], "--warmup_ratio: 1 is not a share below 1; in steps: num_warmup_steps"),
        ("linear", ["--warmup_ratio=0.1", "--num_warmup_steps=3"], "num_warmup_steps is given too: give one of them"),
        (
            "linear",
            ["--warmup_ratio=0.1", "--warmup_steps=3"],
            "warmup_steps: warmup_ratio is given too: give one of them",
        ),
        (
            "linear",
            ["--warmup_steps=3", "--warmup_ratio=0.1"],
            "warmup_ratio: warmup_steps is given too: give one of them",
        ),
        ("linear", ["--num_warmup_steps=1.5"], "a whole number of steps, or a share from 0 to below 1"),
        ("constant", ["--num_warmup_steps=3"], "num_warmup_steps has no effect with lr_scheduler_type constant"),
        (
            "stepwise",
            [],
            "one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, wsd",
        ),
    ],
)
def test_what_a_schedule_cannot_do_is_one_sentence(schedule, words, said):
    with pytest.raises(ValueError) as error:
        read_settings([*WORDS, f"--lr_scheduler_type={schedule}", *words])
    (line,) = str(error.value).split("\n")
    assert said in line


def test_a_resumed_run_takes_the_rates_of_one_left_alone_and_refuses_other_parameters(text_file, tmp_path, capsys):
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=12", "--logging_steps=1"]
    arguments += ["--checkpointing_steps=6", "--lr_scheduler_type=wsd", "--num_warmup_steps=0.2"]
    kwargs = {"decay_ratio": 0.5, "min_lr_ratio": 0.1}
    given = f"--lr_scheduler_kwargs={json.dumps(kwargs)}"
    assert main([*arguments, given, f"--output_dir={tmp_path}/alone"]) == 0
    settings = Settings(learning_rate=1e-2, lr_scheduler_type="wsd", lr_scheduler_kwargs=kwargs, num_warmup_steps=0.2)
    logged = [line["learning_rate"] for line in lines_of(tmp_path / "alone") if "loss" in line]
    assert logged == [1e-2 * lr_factor(step, 12, settings) for step in range(12)]

    copy_until(6, tmp_path / "alone", tmp_path / "resumed")
    resume = [*arguments, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]
    capsys.readouterr()
    assert main([*resume, '--lr_scheduler_kwargs={"decay_ratio": 0.4, "min_lr_ratio": 0.1}']) == 1
    assert "lr_scheduler_kwargs: {'decay_ratio': 0.5, 'min_lr_ratio': 0.1} -> {'decay_ratio': 0.4" in (
        capsys.readouterr().err
    )
    assert main([*resume, given]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "alone")


@pytest.mark.parametrize("warmup, changed", [(0.1, []), (0.0, ["num_warmup_steps: 0.1 -> 0.0"])])
def test_a_checkpoint_with_its_warmup_as_warmup_ratio_is_of_the_run_with_that_share(warmup, changed):
    older = {"num_warmup_steps": 0, "warmup_ratio": 0.1}
    state, settings = {"identity": older, "settings": older}, Settings(num_warmup_steps=warmup)
    assert differences(state, {"num_warmup_steps": warmup}, settings) == ([], changed, [], [], [])
