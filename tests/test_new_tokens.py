"""A tokenizer with more tokens than the model has rows, and one that names no end-of-text token."""

import json

import pytest
import torch
from conftest import assert_same_run, copy_until, save_model, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_loop import generate
from train_loop.main import main
from train_loop.model import load_config, load_model, load_tokenizer
from train_loop.settings.settings import Settings

ADDED = ["<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def grown(request, text_file, tmp_path_factory):
    """The folder of a model (gpt2: tied, llama: not). Beside it `more` holds its tokenizer with new tokens."""
    folder = save_model(tmp_path_factory.mktemp("grown") / "model", text_file, request.param)
    add_tokens(folder, folder.with_name("more"))
    return folder


def add_tokens(folder, place):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    tokenizer.save_pretrained(place)


def loaded(**values):
    settings = Settings(block_size=32, **values)
    config = load_config(settings)
    tokenizer = load_tokenizer(settings, None, config)
    return load_model(settings, config, tokenizer), tokenizer


def arguments_for(model, tokenizer, text_file, *more):
    arguments = [f"--model_name_or_path={model}", f"--tokenizer_name={tokenizer}", f"--train_file={text_file}"]
    arguments += ["--block_size=32", "--learning_rate=1e-2", "--max_train_steps=6", "--checkpointing_steps=3"]
    return [*arguments, "--logging_steps=1", "--max_eval_samples=8", "--num_threads=1", *more]


def test_new_rows_are_the_mean_of_the_old_ones_which_stay(grown, capsys):
    """Tolerance: the random part of a new row is a hundred thousandth of the old rows' spread."""
    old = AutoModelForCausalLM.from_pretrained(grown)
    model, tokenizer = loaded(model_name_or_path=str(grown), tokenizer_name=f"{grown.parent}/more")
    assert len(tokenizer) == 303 == model.config.vocab_size
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(m, name)().weight for m in (old, model))
        assert torch.equal(after[:300], before) and after.shape == (303, 32)
        torch.testing.assert_close(after[300:], before.mean(0).expand(3, -1), rtol=0, atol=2e-4 * before.std().item())
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (old, model)]
    assert tied == [old.config.tie_word_embeddings] * 2
    said = "the tokenizer has 3 tokens more than the model: '<|user|>' (300), '<|assistant|>' (301), '<|end|>' (302)."
    assert f"note: {said} The embedding grows from 300 to 303 rows" in capsys.readouterr().err


def test_new_rows_follow_from_the_seed_alone(grown):
    tokenizer = f"{grown.parent}/more"
    rows = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # whatever was drawn before
        model, _ = loaded(model_name_or_path=str(grown), tokenizer_name=tokenizer, seed=seed)
        rows.append(model.get_input_embeddings().weight[300:])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_grown_model_trains_resumes_reloads_and_writes(grown, text_file, tmp_path, capsys):
    with open(text_file, encoding="utf-8") as file:
        (tmp_path / "chat.txt").write_text("".join(f"<|user|>{line.strip()}<|end|>\n" for line in file if line.strip()))
    arguments = arguments_for(grown, grown.parent / "more", tmp_path / "chat.txt")
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    copy_until(3, tmp_path / "run", tmp_path / "resumed")
    assert main([*arguments, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "run")

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values()) and model.config.vocab_size == 303
    rows = model.get_input_embeddings().weight
    assert (rows[302] - rows[301]).abs().max() > 1e-3  # <|end|> was trained, <|assistant|> never came
    capsys.readouterr()
    evaluation = [f"--model_name_or_path={tmp_path}/run", f"--validation_file={text_file}", "--block_size=32"]
    assert main([*evaluation, "--eval_only", "--max_eval_samples=4"]) == 0
    assert "grows" not in capsys.readouterr().err
    assert generate.main([str(tmp_path / "run"), "<|user|>The value", "--max_new_tokens=4"]) == 0
    assert "The value" in capsys.readouterr().out


def test_a_vocabulary_that_was_extended_grows_and_that_of_another_model_is_refused(text_file, tmp_path):
    """The first 300 merges of a tokenizer of 310 are those of a tokenizer of 300 from the same text."""
    model = save_model(tmp_path / "model", text_file)
    for name, num_tokens in (("extended", 310), ("other", 310)):
        save_model(tmp_path / name, text_file, num_tokens=num_tokens)
    other = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    grown, _ = loaded(model_name_or_path=str(model), tokenizer_name=f"{tmp_path}/extended")
    assert grown.config.vocab_size == 310
    with pytest.raises(
        ValueError, match=r"beyond the model's vocabulary of 300: .* \(300\).*It is not the model's own"
    ):
        loaded(model_name_or_path=str(model), tokenizer_name=f"{tmp_path}/other")


@pytest.mark.parametrize("ids, said", [(5, True), ([5, 7], True), (5000, False), (None, False)])
def test_a_tokenizer_without_an_end_of_text_token_gets_the_one_that_the_model_names(
    ids, said, text_file, tmp_path, capsys
):
    model = save_model(tmp_path / "model", text_file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": ids}))
    tokenizer_config = json.loads((model / "tokenizer_config.json").read_text())
    del tokenizer_config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in text_file.read_text().split("\n\n")))
    arguments = [f"--model_name_or_path={model}", f"--train_file={documents}", "--add_eos_token", "--block_size=32"]
    arguments += ["--max_train_steps=1", "--max_eval_samples=4", f"--output_dir={tmp_path}/run"]
    status = main(arguments)
    error = capsys.readouterr().err
    token = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(5)
    note = f"the tokenizer has no end-of-text token: {token!r} (5) is used, as the model's config says"
    assert (status == 0, note in error) == (said, said), error
    if said:
        assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token_id == 5
        assert weights_of(tmp_path / "run")
    else:
        assert "add_eos_token: the tokenizer has no end-of-text token" in error


def test_the_end_of_text_token_of_another_vocabulary_is_not_taken(text_file, tmp_path):
    """The id in the model's config means another token of a tokenizer that is not the model's own."""
    model = save_model(tmp_path / "model", text_file, eos_token_id=5)
    tokenizer_config = json.loads((model / "tokenizer_config.json").read_text())
    del tokenizer_config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    settings = Settings(model_name_or_path=str(model), block_size=32)
    assert load_tokenizer(settings, None, load_config(settings)).eos_token_id == 5
    settings.tokenizer_name = str(model)
    assert load_tokenizer(settings, None, load_config(settings)).eos_token_id is None
