"""Prompts and completions: what is a target, in which blocks, from which files."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from chat_templates import byte_tokenizer, messages, shown
from conftest import (
    NO_DROPOUT,
    TWO,
    assert_lines_agree,
    lines_of,
    make_model,
    parquet,
    run,
)

from train_loop.data import load_file, load_rows, load_source, load_split
from train_loop.data.blocks import Windows, inputs_and_labels, model_inputs
from train_loop.data.marks import ID
from train_loop.data.streaming import Stream
from train_loop.loss import next_token_loss
from train_loop.main import main
from train_loop.position import Place
from train_loop.probes import keep_apart_where_possible
from train_loop.settings.settings import Settings

ALONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
ROWS = [{"prompt": f"What is {i}+{i}? ", "completion": f"It is {2 * i}."} for i in range(40)]
TOKENIZER = byte_tokenizer()


def write(folder, rows, kind="jsonl"):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        path.write_bytes(parquet(rows))
    return path


def prepared(path, tokenizer=TOKENIZER, **more):
    """The `Split` of a file."""
    settings = Settings(train_file=str(path), **{"block_size": 16, **more})
    return load_split(load_file(path, settings), tokenizer, "training", settings)


def stream_of(path, **more):
    """(the `Stream` of a file, its settings)."""
    options = {"validation_file": str(path), "streaming": True, "max_train_steps": 9, "per_device_train_batch_size": 1}
    settings = Settings(train_file=str(path), shuffle_buffer_size=0, **options, **{"block_size": 16, **more})
    return Stream(load_source(settings)[0], TOKENIZER, settings), settings


@pytest.mark.quick
def test_the_completion_and_the_end_of_text_are_targets_and_the_prompt_is_none(tmp_path):
    split = prepared(write(tmp_path, ROWS), block_size=32)
    assert shown(split.blocks[0], TOKENIZER) == "¦What is 0+0? «It is 0.<|endoftext|>»¦What is 1+"


def test_without_completion_only_loss_every_token_is_a_target(tmp_path):
    inputs = inputs_and_labels(prepared(write(tmp_path, ROWS), completion_only_loss=False).blocks)
    np.testing.assert_array_equal(inputs["labels"], inputs["input_ids"])


def test_a_prompt_that_ends_within_a_token_gives_that_token_to_the_completion(tmp_path):
    """As in TRL: the completion is what comes after the common tokens. A message counts such rows."""
    tokenizer = byte_tokenizer(merges=[("Ġ", "I"), ("ĠI", "t")])
    split = prepared(write(tmp_path, ROWS), tokenizer, block_size=32)
    assert shown(split.blocks[0], tokenizer).startswith("¦What is 0+0?« It is 0.<|endoftext|>»")
    assert "prompts that end within a token: 40; move white space" in split.summary()
    rows = [{"prompt": row["prompt"].strip(), "completion": " " + row["completion"]} for row in ROWS]
    split = prepared(write(tmp_path, rows), tokenizer, block_size=32)
    assert shown(split.blocks[0], tokenizer).startswith("¦What is 0+0?« It is 0.<|endoftext|>»")
    assert "within a token" not in split.summary()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_blocks_prepared_and_streamed(kind, tmp_path):
    expected = prepared(write(tmp_path, ROWS)).blocks
    path = write(tmp_path, [{"n": i, **row} for i, row in enumerate(ROWS)], kind)
    np.testing.assert_array_equal(prepared(path).blocks, expected)
    if kind != "json":  # one array cannot be streamed
        stream, settings = stream_of(path)
        windows = [window.tensors for window in stream.windows(Place(0, 0), settings, ALONE)]
        for name, values in model_inputs(expected, True).items():
            np.testing.assert_array_equal(torch.cat([window[name][0] for window in windows]), values, name)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_on_disk_gives_the_same_rows(streaming, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(write(tmp_path, ROWS).read_bytes())
    (tmp_path / "test.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "rows.jsonl").unlink()
    settings = Settings(dataset_name=str(tmp_path), streaming=streaming)
    train, held_out, _ = (load_source if streaming else load_rows)(settings)
    expected = [(row["prompt"], row["completion"]) for row in ROWS]
    assert [row["text"] for row in held_out] == expected
    if not streaming:
        assert [row["text"] for row in train] == expected


@pytest.mark.quick
def test_columns_are_chosen_by_name_or_by_what_they_usually_are_called(tmp_path):
    def kind_and_first(row, **settings):
        path = write(tmp_path, [row])
        rows = load_file(path, Settings(train_file=str(path), **settings))
        return rows.kind, next(iter(rows))["text"]

    chat = messages("a", "b")
    everything = {"other": "o", "messages": chat, "completion": "c", "prompt": "p", "text": "t"}
    assert kind_and_first(everything) == ("text", "t")
    del everything["text"]
    assert kind_and_first(everything) == ("prompt + completion", ("p", "c"))
    assert kind_and_first(everything, text_column=["other", "prompt"]) == ("prompt + completion", ("o", "p"))
    assert kind_and_first(everything, text_column=["messages"]) == ("chat", chat)
    del everything["prompt"]
    assert kind_and_first(everything) == ("chat", chat)
    assert kind_and_first({"id": 1, "body": "b"}) == ("text", "b")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl has no column 'answer' of text; text_column may be one of: body"
    ):
        kind_and_first({"id": 1, "body": "b"}, text_column=["body", "answer"])
    with pytest.raises(ValueError, match="text_column names 'body' twice"):
        kind_and_first({"id": 1, "body": "b"}, text_column=["body", "body"])


@pytest.mark.quick
@pytest.mark.parametrize("given", [None, ["messages"]])
def test_messages_that_are_a_text_in_one_row_are_named_with_its_line(given, tmp_path):
    rows = [{"messages": messages("a", "b")}] * 20
    path = write(tmp_path, [*rows, {"messages": "a"}, *rows])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 21: 'messages' is no list of messages"):
        [*load_file(path, Settings(train_file=str(path), text_column=given))]


def test_a_stream_says_once_that_prompts_end_within_a_token(tmp_path, capsys):
    path = write(tmp_path, ROWS)
    options = {"validation_file": str(path), "streaming": True, "max_train_steps": 9, "block_size": 16}
    settings = Settings(train_file=str(path), **options)
    stream = Stream(load_source(settings)[0], byte_tokenizer(merges=[("Ġ", "I"), ("ĠI", "t")]), settings)
    assert len([*stream.windows(Place(0, 0), settings, ALONE)])
    assert capsys.readouterr().err.count("prompts of the training data end within a token: move white space") == 1


@pytest.mark.parametrize("read", [prepared, lambda path: [*stream_of(path)[0].windows(Place(0, 0), Settings(), ALONE)]])
@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"prompt": "p", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": None, "completion": "c"}, "'prompt' is null"),
        ({"prompt": "p", "completion": None}, "'completion' is null"),
        ({"prompt": "p"}, "the key 'completion' is missing"),
        ({"prompt": "p", "completion": 7}, "'completion' is no text"),
        ({"prompt": messages("p"), "completion": "c"}, "'completion' is no list of messages"),
        ({"prompt": "p", "completion": messages("a", "c")[1:]}, "'completion' is no text"),
        (
            {"prompt": messages("p"), "completion": messages("c")},
            "message of 'completion' is not the assistant's",
        ),
    ],
)
def test_a_row_that_is_no_prompt_and_completion_is_named_with_its_line(read, row, said, tmp_path):
    path = write(tmp_path, [*ROWS[:2], row, ROWS[2]])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{said}"):
        read(path)


@pytest.mark.parametrize("kind, where", [("csv", "line 3"), ("parquet", "row 2"), ("json", "row 2")])
def test_an_empty_answer_is_named_in_every_kind_of_file(kind, where, tmp_path):
    path = write(tmp_path, [ROWS[0], {"prompt": "p", "completion": ""}], kind)
    with pytest.raises(ValueError, match=rf"rows\.{kind}, {where}: 'completion' is empty"):
        prepared(path)


def test_without_packing_each_row_has_a_block_of_its_own(tmp_path):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "abc", "completion": "0123456789"},  # 3 + 10 and the end: 6 too many
        {"prompt": "a prompt alone", "completion": "x"},
    ]
    path = write(tmp_path, rows)
    split = prepared(path, block_size=8, packing=False)
    end = "<|endoftext|>"
    assert [shown(b, TOKENIZER) for b in split.blocks] == [f"ab«cd{end}»{end * 3}", "abc«01234»"]
    summary = split.summary()
    assert "3 rows (prompt + completion) -> 13 tokens -> 2 blocks of 8 with 8 targets" in summary
    assert "longer rows, which are cut: 1, by 6 tokens" in summary
    assert "rows left out, without a target in their first 8 tokens: 1" in summary
    assert prepared(path, block_size=8, packing=False).summary() == summary, "what the cache says of it"
    stream, settings = stream_of(path, block_size=8, packing=False)
    windows = [window.tensors["labels"][0, 0] for window in stream.windows(Place(0, 0), settings, ALONE)]
    np.testing.assert_array_equal(torch.stack(windows), inputs_and_labels(split.blocks)["labels"])


def test_text_without_packing_is_filled_up_too(tmp_path):
    path = write(tmp_path, [{"text": "abc"}, {"text": ""}, {"text": "defghijk"}])
    split = prepared(path, block_size=5, packing=False)
    assert [shown(b, TOKENIZER) for b in split.blocks] == ["«abc»<|endoftext|><|endoftext|>", "«defgh»"]


@pytest.mark.quick
def test_tokens_of_text_have_no_marks_and_a_written_end_of_text_begins_no_row(tmp_path):
    path = write(tmp_path, [{"text": "abc<|endoftext|>def"}] * 9)
    assert (prepared(path).blocks <= ID).all()
    split = prepared(path, add_eos_token=True, document_attention=True)
    assert shown(split.blocks[0], TOKENIZER) == 2 * "¦«abc<|endoftext|>def<|endoftext|>»"


def test_what_a_row_begins_with_has_no_influence_on_the_loss_of_the_next_one(tmp_path):
    """And the loss of a packed block is the sum of its rows' losses, each alone. Tolerance: float32's rounding."""
    model = make_model("llama").eval()
    model.resize_token_embeddings(len(TOKENIZER))

    def nats(rows, **settings):
        split = prepared(write(tmp_path, rows), **settings)
        window = Windows(split.blocks, range(len(split.blocks)), 8, 1, documents_apart=split.documents_apart)[0]
        with torch.no_grad():
            loss, num_targets, _ = next_token_loss(model, {name: value[0] for name, value in window.items()})
        return loss.item(), num_targets.item()

    first, other, second = ({"prompt": p, "completion": "cde"} for p in ("ab", "xy", "pq"))
    both, num_targets = nats([first, second], block_size=12)
    changed, _ = nats([other, second], block_size=12)
    alone = [nats([row], block_size=6)[0] for row in (first, other, second)]
    assert num_targets == 8
    assert both == pytest.approx(alone[0] + alone[2], rel=1e-6)
    assert changed == pytest.approx(alone[1] + alone[2], rel=1e-6)
    leaked = nats([first, second], block_size=12, document_attention=False)[0]
    assert abs(leaked - both) > 1e-3 * both, "the test shows nothing"


ARGUMENTS = [
    "--model_type=gpt2",
    NO_DROPOUT,
    "--tokenizer_vocab_size=300",
    "--block_size=32",
    "--learning_rate=1e-2",
    "--logging_steps=1",
    "--num_threads=1",
    "--per_device_train_batch_size=4",
    "--max_train_steps=6",
    "--checkpointing_steps=3",
]


def test_a_model_that_cannot_keep_rows_apart_trains_on_them_and_says_so(tmp_path):
    split, model = prepared(write(tmp_path, ROWS)), make_model("opt", dropout=True)
    assert split.documents_apart
    said = keep_apart_where_possible(model, [split])
    assert said == ["the rows of a block are not kept apart: the attention of opt cannot do that"]
    assert not split.documents_apart
    assert keep_apart_where_possible(model, [split]) == [], "nothing is left to say"


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Tolerance: sums in another order."""
    for name, launcher, micro_batch in (("one", None, 4), ("two", TWO, 2)):
        arguments = [*ARGUMENTS, f"--per_device_train_batch_size={micro_batch}"]
        arguments += [f"--train_file={write(tmp_path, ROWS * 4)}", f"--output_dir={tmp_path / name}"]
        if launcher is None:
            main(arguments)
        else:
            done = run("train_loop/main.py", *arguments, launcher=launcher)
            assert done.returncode == 0, done.stderr
    lines = [lines_of(tmp_path / name) for name in ("one", "two")]
    for line in [*lines[0], *lines[1]]:
        line.pop("tokens_per_second", None)
    assert_lines_agree(lines[1], lines[0], rel=1e-4)


def test_blocks_without_a_target_change_nothing_and_break_nothing(tmp_path):
    rows = [{"prompt": "a long prompt of many words " * 9, "completion": "yes"}] * 4
    arguments = [a for a in ARGUMENTS if "batch_size" not in a] + ["--per_device_train_batch_size=1"]
    arguments += [f"--train_file={write(tmp_path, rows)}", f"--output_dir={tmp_path / 'run'}", "--weight_decay=0"]
    main([*arguments, f"--validation_file={tmp_path / 'rows.jsonl'}", "--block_size=16"])
    lines = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert 0 < len(lines) < 6, "some steps have no target, and so no line"
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("step", [1, -1])  # the first blocks, which the plan tries, are without a target; or with one
def test_a_run_whose_steps_have_no_target_is_exported_and_a_plan_of_it_says_what_to_do(step, tmp_path, capsys):
    rows = [{"prompt": "many words " * 400, "completion": "yes"}, *ROWS[:4]]
    path = write(tmp_path, rows[::step])
    arguments = [a for a in ARGUMENTS if "batch_size" not in a] + ["--per_device_train_batch_size=1"]
    arguments += [f"--train_file={path}", f"--validation_file={path}", f"--output_dir={tmp_path / 'run'}"]
    arguments += ["--block_size=16", "--max_train_steps=1"]
    assert main([*arguments, "--dry_run"]) == 1
    assert "have no target. Give a larger block_size" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "blocks without a target: " in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["tokens_per_second"] == 0


def test_rows_of_which_no_target_is_left_are_refused(tmp_path):
    path = write(tmp_path, [{"prompt": "a long prompt", "completion": "x"}])
    with pytest.raises(ValueError, match="no row of the training data has a target in its first 8 tokens"):
        prepared(path, block_size=8, packing=False)
    with pytest.raises(ValueError, match="no row of the training data has a target in its first 8 tokens"):
        stream_of(path, block_size=8, packing=False)
    with pytest.raises(ValueError, match="the blocks of the training data have no target: give a larger block_size"):
        prepared(path, block_size=8)


def test_a_tokenizer_without_an_end_of_text_cannot_end_a_completion(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="a completion ends with the end-of-text token, and the tokenizer has none"):
        prepared(write(tmp_path, ROWS), tokenizer)


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--text_column", "a", "b", "c"], "--text_column is ['a', 'b', 'c'], but must be text, one column, or two"),
        (["--packing", "false", "--document_attention"], "document_attention needs packing"),
        (["--packing", "false", "--eval_stride", "8"], "eval_stride needs packing"),
        (["--packing", "false", "--named_perplexities"], "named_perplexities needs packing"),
        (
            ["--named_perplexities"],
            "named_perplexities needs rows of text, but the validation data has rows of",
        ),
    ],
)
def test_settings_that_do_not_go_with_such_rows_are_refused(arguments, said, tmp_path, capsys):
    path = write(tmp_path, ROWS * 4)
    assert main([*ARGUMENTS, f"--train_file={path}", f"--output_dir={tmp_path / 'run'}", *arguments]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
