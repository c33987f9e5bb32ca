"""LoRA: what is trained, what a checkpoint holds, what is exported."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import (
    assert_same_run,
    copy_until,
    largest_difference,
    lines_of,
    save_model,
    weights_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_loop import output_dir
from train_loop.loss import next_token_loss
from train_loop.main import main
from train_loop.model import load_config, load_model, load_tokenizer
from train_loop.settings import Settings
from train_loop.settings.command_line import read_settings

peft = pytest.importorskip("peft")

DROPPING = ["--lora_r=4", "--lora_dropout=0.2"]


def arguments_for(model, text_file, *more):
    """Six steps of an epoch of 13, with a checkpoint in the middle and at the end."""
    arguments = [f"--model_name_or_path={model}", f"--train_file={text_file}", "--block_size=32", "--num_threads=1"]
    arguments += ["--max_train_samples=100", "--max_eval_samples=8", "--max_train_steps=6", "--logging_steps=1"]
    return [*arguments, "--learning_rate=5e-2", "--checkpointing_steps=3", *more]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def runs(request, text_file, tmp_path_factory):
    """`model`: a pretrained one. `run`: LoRA with dropout on it. gpt2 is tied and has its weights transposed."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder / "model", text_file, request.param)
    assert main(arguments_for(model, text_file, *DROPPING, f"--output_dir={folder}/run")) == 0
    return folder


@pytest.fixture(scope="module")
def model(text_file, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain") / "model", text_file)


def test_its_matrices_alone_are_trained_and_a_checkpoint_holds_them_alone(runs):
    first, last = (runs / "run" / "checkpoints" / f"step-00000{step}" for step in (3, 6))
    before, after = (load_file(path / "model.safetensors") for path in (first, last))
    assert before and all(".lora_" in name for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    moments = load_file(last / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == before.keys()
    untrained, merged = load_file(runs / "model" / "model.safetensors"), weights_of(runs / "run")
    changed = {name for name in untrained if not torch.equal(untrained[name], merged[name])}
    assert changed == {re.sub(r"lora_A\.default\.", "", name) for name in before if "lora_A" in name}


def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_one_that_never_stopped(runs, text_file, tmp_path):
    """Bit for bit, with dropout before its matrices."""
    copy_until(3, runs / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "adapter")
    arguments = arguments_for(runs / "model", text_file, *DROPPING, f"--output_dir={tmp_path}/resumed")
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "resumed", runs / "run")
    adapters = [
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "resumed", runs / "run")
    ]
    assert largest_difference(*adapters) == 0


def test_the_exported_model_is_the_adapted_one(runs, text_file, tmp_path):
    """Weights as peft merges them; perplexity and text as the model that was trained. Tolerances: W x + B A x against
    (W + B A) x, in float32."""
    base = AutoModelForCausalLM.from_pretrained(runs / "model")
    adapted = peft.PeftModel.from_pretrained(base, runs / "run" / "adapter").eval()
    merged, info = AutoModelForCausalLM.from_pretrained(runs / "run", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(runs / "run")
    inputs = tokenizer("The value of", return_tensors="pt")
    texts = [m.generate(**inputs, max_new_tokens=20, do_sample=False) for m in (adapted, merged)]
    assert torch.equal(*texts)
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (adapted, merged)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
        untrained = AutoModelForCausalLM.from_pretrained(runs / "model")(**inputs).logits
    assert (untrained - logits[0]).abs().max() > 0.1
    of_peft = adapted.merge_and_unload().state_dict()
    torch.testing.assert_close({name: of_peft[name] for name in weights_of(runs / "run")}, weights_of(runs / "run"))

    trained = json.loads((runs / "run" / "all_results.json").read_text())["eval_loss"]
    assert trained < lines_of(runs / "run")[0]["eval_loss"] - 0.03
    evaluation = [f"--model_name_or_path={runs}/run", f"--train_file={text_file}", "--block_size=32", "--eval_only"]
    assert main([*evaluation, "--max_eval_samples=8", f"--output_dir={tmp_path}/evaluated"]) == 0
    merged_loss = json.loads((tmp_path / "evaluated" / "all_results.json").read_text())["eval_loss"]
    assert merged_loss == pytest.approx(trained, rel=1e-5)


def test_card_banner_and_settings_say_it(runs, text_file, tmp_path, capsys):
    card = " ".join((runs / "run" / "README.md").read_text().split())
    num_merged = AutoModelForCausalLM.from_pretrained(runs / "run").num_parameters()
    num_trained = sum(t.numel() for t in load_file(runs / "run" / "adapter" / "adapter_model.safetensors").values())
    assert f"{num_merged:,} parameters), fine-tuned from" in card and "with LoRA on" in card
    assert f"{num_trained:,} parameters were trained: LoRA matrices of rank 4" in card
    for line in ("lora_r: 4", "lora_alpha: 32", "lora_dropout: 0.2"):
        assert f"- {line}" in card and line in (runs / "run" / "train_config.yaml").read_text()
    arguments = arguments_for(runs / "model", text_file, *DROPPING, f"--output_dir={tmp_path}/run")
    assert main([*arguments, "--dry_run"]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert f"{num_merged + num_trained:,} parameters, {num_trained:,} of them trained" in plan
    sizes = f"gradients {4 * num_trained / 1e6:.1f} MB, optimizer {8 * num_trained / 1e6:.1f} MB"
    assert f"weights {4 * (num_merged + num_trained) / 1e6:.1f} MB, {sizes}" in plan


def test_with_layers_that_are_computed_again_the_run_is_the_same_bit_for_bit(runs, text_file, tmp_path):
    arguments = arguments_for(runs / "model", text_file, *DROPPING, "--checkpointing_steps=none")
    assert main([*arguments, "--gradient_checkpointing", f"--output_dir={tmp_path}/run"]) == 0
    assert_same_run(tmp_path / "run", runs / "run")


def test_tuned_modules_give_the_gradients_of_plain_ones_with_dropout(model):
    """The tuned MLP of GPT-2 recomputes a part, where dropout must draw the same mask. Tolerance: float32 rounding."""
    found = []
    for tuning in (True, False):
        settings = Settings(model_name_or_path=str(model), block_size=32, tuning=tuning, lora_r=4, lora_dropout=0.2)
        config = load_config(settings)
        adapted = load_model(settings, config, load_tokenizer(settings, None)).train()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zeros would hide what is dropped before A
                parameter.data.normal_(0, 0.05, generator=generator)
        ids = torch.randint(300, (4, 32), generator=generator)
        torch.manual_seed(0)
        next_token_loss(adapted, {"input_ids": ids, "labels": ids})[0].backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert len(found[0]) == 16 and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() < 1e-5 * gradient.norm()


def test_frozen_weights_of_another_model_do_not_continue_a_run(model, text_file, tmp_path, capsys):
    arguments = arguments_for(model, text_file, "--lora_r=2")
    shutil.copytree(model, tmp_path / "model")
    arguments[0] = f"--model_name_or_path={tmp_path}/model"
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    weights = weights_of(model)
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + 1e-7
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for more, said in (([], "frozen weights: "), (["--lora_alpha=8"], "lora_alpha: 32 -> 8")):
        copy_until(3, tmp_path / "run", tmp_path / "resumed")
        assert main([*arguments, *more, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]) == 1
        error = capsys.readouterr().err
        assert "belongs to a different run" in error and said in error
        shutil.rmtree(tmp_path / "resumed")


def test_the_best_matrices_are_exported(model, text_file, tmp_path):
    """Training on rows of the letter a raises the loss on rows of the letter b."""
    (tmp_path / "a.txt").write_text("a a a a a a a a a a\n" * 500)
    (tmp_path / "b.txt").write_text("b b b b b b b b b b\n" * 50)
    arguments = arguments_for(model, tmp_path / "a.txt", "--lora_r=8", f"--validation_file={tmp_path}/b.txt")
    arguments += ["--eval_steps=2", "--load_best_model_at_end", "--checkpoints_total_limit=1"]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    step = results["exported_step"]
    assert step < results["step"] and results["eval_loss"] < results["last_eval_loss"]
    best = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == {f"base_model.model.{name.replace('.default', '')}" for name in best}
    assert all(torch.equal(adapter[f"base_model.model.{n.replace('.default', '')}"], t) for n, t in best.items())


def test_layers_are_chosen_by_their_names_the_head_too_where_it_is_not_tied(text_file, tmp_path):
    """An adapted head is no plain linear layer: the loss goes through full logits."""
    llama = save_model(tmp_path / "model", text_file, "llama")
    arguments = arguments_for(
        llama, text_file, "--lora_r=2", "--lora_target_modules", "q_proj", "mlp.up_proj", "lm_head"
    )
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "up_proj", "lm_head"}
    before, after = weights_of(llama), weights_of(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{n}.weight" for n in names}
    trained = json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_loss"]
    evaluation = [f"--model_name_or_path={tmp_path}/run", f"--train_file={text_file}", "--block_size=32", "--eval_only"]
    assert main([*evaluation, "--max_eval_samples=8", f"--output_dir={tmp_path}/evaluated"]) == 0
    merged_loss = json.loads((tmp_path / "evaluated" / "all_results.json").read_text())["eval_loss"]
    assert merged_loss == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "q_proj", "wte"])
def test_a_layer_that_cannot_have_them_is_named_with_those_that_can(target, model, text_file, tmp_path, capsys):
    """GPT-2's head is tied to its embedding: merging would change both."""
    arguments = arguments_for(model, text_file, "--lora_r=2", f"--lora_target_modules={target}")
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 1
    said = f"gpt2 has no linear layer '{target}' that LoRA can be put into. It has c_attn, c_fc, c_proj"
    assert f"error: lora_target_modules: {said}" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_with_new_tokens_the_embedding_is_trained_and_is_in_the_adapter(model_type, text_file, tmp_path):
    folder = save_model(tmp_path / "model", text_file, model_type)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|user|>", "<|end|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "more")
    arguments = arguments_for(folder, text_file, "--lora_r=2", f"--tokenizer_name={tmp_path}/more")
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    for table in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        assert len(table.weight) == 302
    ids = torch.tensor([[1, 300, 7, 301, 9]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_an_overwritten_run_loses_its_adapter_and_nothing_else(model, text_file, tmp_path, capsys):
    arguments = [*arguments_for(model, text_file), f"--output_dir={tmp_path}/run", "--max_train_steps=1"]
    assert main([*arguments, "--lora_r=2"]) == 0
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    assert main([*arguments, "--overwrite_output_dir"]) == 0
    assert [path.name for path in (tmp_path / "run" / "adapter").iterdir()] == ["notes.txt"]
    assert "that no run made are kept: adapter" in capsys.readouterr().err


def test_the_adapter_of_a_run_without_a_record_goes_too(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).touch()
    output_dir._overwrite(tmp_path, set())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model_name_or_path=m", "--lora_alpha=8"], "lora_alpha needs lora_r"),
        (["--model_name_or_path=m", "--lora_dropout=0.1"], "lora_dropout needs lora_r"),
        (["--model_name_or_path=m", "--lora_target_modules=c_attn"], "lora_target_modules needs lora_r"),
        (["--model_name_or_path=m", "--lora_r=0"], "lora_r is '0', but must be a whole number, at least 1"),
        (
            ["--model_name_or_path=m", "--lora_r=8", "--eval_only"],
            "lora_r is for training: it has no effect with eval_only",
        ),
        (["--model_type=gpt2", "--tokenizer_vocab_size=300", "--lora_r=8"], "lora_r needs model_name_or_path"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(arguments, said, text_file):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_settings([f"--train_file={text_file}", "--output_dir=o", *arguments])


def test_without_peft_one_sentence_says_how_to_install_it(model, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(arguments_for(model, text_file, "--lora_r=2", f"--output_dir={tmp_path}/run")) == 1
    error = capsys.readouterr().err
    assert error == 'error: lora_r needs the package peft: python -m pip install "peft>=0.21"\n'
