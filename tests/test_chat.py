"""Chats: what the assistant wrote is found through the tokenizer's chat template."""

import json

import pytest
from chat_templates import CHATML, LLAMA3, MARKED, byte_tokenizer, messages, shown
from conftest import NO_DROPOUT, assert_same_run, copy_until, parquet

from train_loop.data import load_file, load_split
from train_loop.main import main
from train_loop.settings.settings import Settings

CHAT = messages("1+1?", "It is 2. 😀", "And 2+2?", "4 ", system="Add.")
# as TRL's SFTTrainer has the labels: tests/benchmarks/chats.py compares them where TRL is installed
EXPECTED = {
    CHATML: "¦<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    "«It is 2. 😀<|im_end|>\n»<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n«4 <|im_end|>\n»",
    LLAMA3: "¦<|begin|><|header|>system<|end_header|>\n\nAdd.<|eot|><|header|>user<|end_header|>\n\n1+1?<|eot|>"
    "<|header|>assistant<|end_header|>\n\n«It is 2. 😀<|eot|>»<|header|>user<|end_header|>\n\nAnd 2+2?<|eot|>"
    "<|header|>assistant<|end_header|>\n\n«4<|eot|>»",
    MARKED: "¦<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    "«It is 2. 😀<|im_end|>»\n<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n«4 <|im_end|>»\n",
}
# as some models have it: what the assistant thought is left out of all turns but the last
FORGETS = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if loop.last %}{{ message['content'] }}{% else %}"
    "{{ message['content'].split('#')[-1] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def prepared(folder, rows, tokenizer, kind="jsonl", **more):
    """The `Split` of `rows`, from a file of this kind."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        path.write_bytes(parquet(rows))
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(train_file=str(path), **{"block_size": 16, **more})
    return load_split(load_file(path, settings), tokenizer, "training", settings)


def text_of(split, tokenizer):
    """Of all blocks of one row, without what it lacks at the end."""
    return shown(split.blocks.reshape(-1), tokenizer)


@pytest.mark.quick
@pytest.mark.parametrize("template", EXPECTED, ids=["chatml", "llama3", "marked"])
def test_what_the_assistant_wrote_and_the_end_of_its_turn_are_the_targets(template, tmp_path):
    tokenizer = byte_tokenizer(template)
    split = prepared(tmp_path, [{"messages": CHAT}], tokenizer, block_size=2)
    assert EXPECTED[template].startswith(text_of(split, tokenizer)[:-2])
    assert split.num_dropped < 2


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_every_kind_of_file_that_holds_lists_gives_the_same_tokens(kind, template, tmp_path):
    rows = [{"id": 7, "messages": CHAT}, {"id": 8, "messages": [{**CHAT[1], "name": "a"}, CHAT[2]]}]
    tokenizer = byte_tokenizer(template)
    expected = prepared(tmp_path, rows, tokenizer)
    found = prepared(tmp_path, rows, tokenizer, kind)
    assert text_of(found, tokenizer) == text_of(expected, tokenizer)


@pytest.mark.quick
def test_a_prompt_and_its_completion_may_be_messages(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    split = prepared(tmp_path, [{"prompt": CHAT[:-1], "completion": CHAT[-1:]}], tokenizer, block_size=2)
    expected = EXPECTED[CHATML].replace("«", "").replace("»", "").replace("4 <|im_end|>\n", "«4 <|im_end|>\n»")
    assert expected.startswith(text_of(split, tokenizer)[:-2])


def test_a_template_that_leaves_out_parts_of_earlier_turns_is_refused(tmp_path):
    good, bad = messages("a", "b#c"), messages("a", "hm#b", "c", "d")
    tokenizer = byte_tokenizer(FORGETS)
    assert text_of(prepared(tmp_path, [{"messages": good}], tokenizer, block_size=2), tokenizer).startswith(
        "¦user: a\nassistant: «b#c"
    )
    with pytest.raises(ValueError, match="row 2 of the training data: the chat template writes the beginning of"):
        prepared(tmp_path, [{"messages": good}, {"messages": bad}], tokenizer)
    split = prepared(tmp_path, [{"messages": bad}], tokenizer, block_size=2, completion_only_loss=False)
    assert text_of(split, tokenizer).startswith("¦«user: a\nassistant: b\nuser: c\nassistant: ")


@pytest.mark.parametrize("template", [NO_SYSTEM, NO_SYSTEM.replace(CHATML, MARKED)], ids=["plain", "marked"])
def test_a_chat_that_the_template_refuses_is_named_with_the_templates_words(template, tmp_path):
    rows = [{"messages": CHAT[1:]}, {"messages": CHAT}]
    with pytest.raises(
        ValueError, match="row 2 of the training data: the chat template refuses it: System role not supported"
    ):
        prepared(tmp_path, rows, byte_tokenizer(template))


@pytest.mark.quick
@pytest.mark.parametrize(
    "template, chat, said",
    [
        (None, CHAT, r"the tokenizer has no chat template. Give a tokenizer that has one \(tokenizer_name\)"),
        (CHATML, CHAT[2:], "row 1 of the training data: its first message is the assistant's"),
        (MARKED.replace("'assistant'", "'robot'"), CHAT, "row 1 .*: the chat template marks nothing in it"),
        (CHATML, [{"role": "robot", "content": "a"}], "line 1: message 1 of 'messages' has the role 'robot', .* tool"),
        (CHATML, [{"content": "a"}], "line 1: message 1 of 'messages' has no role; roles are system"),
        (
            CHATML,
            [*CHAT[:2], {"role": "assistant", "content": " "}],
            "message 3 of 'messages': the assistant's answer is",
        ),
        (CHATML, [{"role": "user", "content": None}], "message 1 of 'messages' has no content"),
        (CHATML, [{"role": "user", "content": [{"type": "text"}]}], "message 1 of .* has a content that is no text"),
        (CHATML, CHAT[:2], "no message of 'messages' is the assistant's: there is nothing to learn in it"),
        (CHATML, [*CHAT, {"role": "assistant", "tool_calls": [{}]}], "message 6 .* has tool_calls, which are not supp"),
        (CHATML, [], "'messages' has no messages"),
        (CHATML, ["hello"], "message 1 of 'messages' is no object with role and content"),
        (CHATML, [{"role": "user", "content": "\ud800"}, CHAT[2]], "has one half of a surrogate pair"),
    ],
)
def test_a_chat_that_cannot_be_learned_from_is_refused_with_a_sentence(template, chat, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, [{"messages": chat}], byte_tokenizer(template))


def test_add_eos_token_is_not_for_chats(tmp_path):
    with pytest.raises(ValueError, match="add_eos_token is for rows of text: a chat ends as the chat template ends it"):
        prepared(tmp_path, [{"messages": CHAT}], byte_tokenizer(CHATML), add_eos_token=True)


@pytest.mark.parametrize("how", ["prepared", "streamed"])
def test_a_run_on_chats_that_was_killed_resumes_bit_for_bit(how, tmp_path, capsys):
    path, tokenizer = tmp_path / "chats.jsonl", tmp_path / "tokenizer"
    chats = [messages(f"{i}+{i}?", f"It is {2 * i}.") for i in range(90)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    byte_tokenizer(CHATML).save_pretrained(tokenizer)
    arguments = ["--model_type=gpt2", NO_DROPOUT, f"--tokenizer_name={tokenizer}", "--block_size=32"]
    arguments += [f"--train_file={path}", f"--validation_file={path}", "--learning_rate=1e-2", "--logging_steps=1"]
    arguments += ["--max_train_steps=6", "--checkpointing_steps=3", "--checkpoints_total_limit=9", "--num_threads=1"]
    arguments += ["--streaming", "--shuffle_buffer_size=8"] if how == "streamed" else []
    main([*arguments, f"--output_dir={tmp_path / 'whole'}"])
    assert "rows (chat)" in capsys.readouterr().out
    copy_until(3, tmp_path / "whole", tmp_path / "resumed")
    main([*arguments, f"--output_dir={tmp_path / 'resumed'}", "--resume_from_checkpoint=auto"])
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_template_that_writes_the_date_is_not_streamed(tmp_path, capsys):
    """A run that is resumed on another day would read other tokens."""
    path, tokenizer = tmp_path / "chats.jsonl", tmp_path / "tokenizer"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    byte_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML).save_pretrained(tokenizer)
    arguments = ["--model_type=gpt2", NO_DROPOUT, f"--tokenizer_name={tokenizer}", "--block_size=32", "--streaming"]
    arguments += [f"--train_file={path}", f"--validation_file={path}", "--max_train_steps=2"]
    assert main([*arguments, f"--output_dir={tmp_path / 'run'}"]) == 1
    assert "the chat template writes today's date into each row" in " ".join(capsys.readouterr().err.split())
