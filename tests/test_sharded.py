"""FSDP2 on a CPU: Accelerate itself shards the model over gloo, once its state says so; the launcher's word alone
becomes DDP there. Blocks of an optimizer step are 12, on any number of processes; dropout is off."""

import contextlib
import json
import socket

import pytest
import torch
from conftest import (
    LAUNCH,
    TINY,
    assert_lines_agree,
    largest_difference,
    lines_of,
    run_program,
    save_model,
    weights_of,
    without_timings,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_loop.checkpoint.durable import damage, name_of, steps_in
from train_loop.checkpoint.sharded import Shares, write_share
from train_loop.main import main
from train_loop.trial.plan import state_bytes

# rows that no number of processes divides
SHAPE = "n_layer=2,n_head=1,n_embd=31,n_positions=64,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
FROM_SCRATCH = ("--model_type", "--config_overrides", "--tokenizer_vocab_size")
# torch 2.11 on a CPU has no layer norm of float32 with weights in bfloat16 ("mixed dtype"); on a GPU it has
HAS_BF16 = not torch.__version__.startswith(("2.11.", "2.12."))


def fsdp(num_processes, *runs):
    """Each run is (precision, rank whose disk is full or None, arguments)."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in runs]
        runs = [(*values, server.getsockname()[1]) for values, server in zip(runs, servers, strict=True)]
    config = ("--config_file", "launch_configs/fsdp.yaml", f"--num_processes={num_processes}")
    done = run_program("fsdp_on_cpu.py", json.dumps(runs), launcher=(*LAUNCH, *config), timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def arguments_for(output_dir, micro_batch, text_file, resume=None):
    return [
        *TINY,
        f"--config_overrides={SHAPE}",
        f"--train_file={text_file}",
        f"--per_device_train_batch_size={micro_batch}",
        "--gradient_accumulation_steps=2",
        "--learning_rate=1e-3",
        "--max_train_steps=8",
        "--eval_steps=4",
        "--checkpointing_steps=4",
        "--logging_steps=1",
        f"--output_dir={output_dir}",
        *([f"--resume_from_checkpoint={resume}/checkpoints/{name_of(4)}"] if resume else []),
    ]


@pytest.fixture(scope="module")
def runs(text_file, tmp_path_factory):
    """`plain`: one process. `sharded`: two processes. `resumed`: two, from sharded's step 4. `from_plain`: two, from
    plain's step 4. `from_sharded`: one, from sharded's. `bf16`: two. `planned`: a --dry_run of two. `full`: two, the
    disk of the second is full. `dropping`, `recomputed`: two with dropout, without and with gradient_checkpointing.
    `plain_lora`: one process, LoRA on a model whose tokenizer has new tokens. `lora`: two. `resumed_lora`: two, from
    lora's step 4."""
    folder = tmp_path_factory.mktemp("runs")
    sharded, dropout = folder / "sharded", "--config_overrides=n_layer=2,n_head=1,n_embd=31,n_positions=64"

    def two(name, *more, precision="no", full_disk_of=None, resume=None):
        return precision, full_disk_of, [*arguments_for(folder / name, 3, text_file, resume), *more]

    model = save_model(folder / "model", text_file, "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder / "more")

    def with_lora(name, micro_batch, resume=None):
        kept = [
            a for a in arguments_for(folder / name, micro_batch, text_file, resume) if not a.startswith(FROM_SCRATCH)
        ]
        return [*kept, f"--model_name_or_path={model}", f"--tokenizer_name={folder}/more", "--lora_r=3"]

    assert main(arguments_for(folder / "plain", 6, text_file)) == 0
    assert main(with_lora("plain_lora", 6)) == 0
    done = fsdp(
        2,
        two("sharded"),
        two("resumed", resume=sharded),
        two("from_plain", resume=folder / "plain"),
        two("bf16", precision="bf16" if HAS_BF16 else "no"),
        two("planned", "--dry_run"),
        two("dropping", dropout),
        two("recomputed", dropout, "--gradient_checkpointing"),
        ("no", None, with_lora("lora", 3)),
        ("no", None, with_lora("resumed_lora", 3, folder / "lora")),
        two("full", full_disk_of=1),  # last: these processes keep the limit
    )
    (folder / "output").write_text(done.stdout + done.stderr)
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == [
        f"exit status {status}" for status in (0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    ], done.stderr
    assert main(arguments_for(folder / "from_sharded", 6, text_file, sharded)) == 0
    return folder


def assert_resumes_as(output_dir, reference):
    """The lines before come with the checkpoint. Tolerances: sums in another order, in float32."""
    assert_lines_agree(without_timings(output_dir), without_timings(reference))
    assert largest_difference(weights_of(output_dir), weights_of(reference)) < 1e-5


def test_sharded_training_equals_plain_training(runs):
    assert_lines_agree(without_timings(runs / "sharded"), without_timings(runs / "plain"))
    assert largest_difference(weights_of(runs / "sharded"), weights_of(runs / "plain")) < 1e-5


def test_a_sharded_run_resumes_bit_for_bit(runs):
    assert without_timings(runs / "resumed") == without_timings(runs / "sharded")
    assert largest_difference(weights_of(runs / "resumed"), weights_of(runs / "sharded")) == 0


def test_one_process_resumes_the_run_of_two_sharded_ones_and_the_other_way_round(runs):
    assert_resumes_as(runs / "from_sharded", runs / "plain")
    assert_resumes_as(runs / "from_plain", runs / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [3, 4])
def test_more_processes_resume_the_run_of_two(num_processes, runs, text_file, tmp_path):
    """Four of them have fewer rows of some tensors than they are."""
    arguments = arguments_for(tmp_path / "run", 12 // (2 * num_processes), text_file, runs / "sharded")
    if num_processes == 4:
        arguments += ["--gradient_accumulation_steps=1", "--per_device_train_batch_size=3"]
    fsdp(num_processes, ("no", None, arguments))
    assert_resumes_as(tmp_path / "run", runs / "plain")


def test_each_process_writes_its_rows_and_no_more(runs):
    """What the files hold together is what torch gathers for the export; the tied weight is there once."""
    checkpoint = runs / "sharded" / "checkpoints" / name_of(8)
    assert damage(checkpoint) is None
    for stem in ("model", "optimizer"):
        files = sorted(checkpoint.glob(f"{stem}*"))
        assert [file.name for file in files] == [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        sizes = [sum(t.numel() for t in load_file(file).values()) for file in files]
        assert max(sizes) < 0.52 * sum(sizes)
    saved = Shares(checkpoint, "model")
    assert largest_difference({name: saved.read(name) for name in saved.pieces}, weights_of(runs / "sharded")) == 0
    for name in ("plain", "from_sharded"):
        assert (runs / name / "checkpoints" / name_of(8) / "model.safetensors").is_file()


def test_the_export_of_a_sharded_run_is_complete_and_tied(runs):
    model, info = AutoModelForCausalLM.from_pretrained(runs / "sharded", output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, weights_of(runs / "sharded")["transformer.wte.weight"])


@pytest.mark.skipif(not HAS_BF16, reason="torch below 2.13 cannot shard in bf16 on a CPU")
def test_the_loss_under_bf16_is_not_rounded_to_bf16(runs):
    """A sum of some 1,400 nats in bfloat16 would be a multiple of 8. Tolerance: products in bfloat16."""
    for a, b in zip(lines_of(runs / "bf16"), lines_of(runs / "plain"), strict=True):
        name = "loss" if "loss" in a else "eval_loss"
        assert a[name] == pytest.approx(b[name], rel=2e-4)


def test_a_plan_of_shares_counts_what_a_process_then_writes(runs):
    """And leaves nothing."""
    assert not (runs / "planned").exists()
    output = (runs / "output").read_text()
    assert "state       of a process (FSDP over 2)" in output and "beside what was counted" in output
    model = AutoModelForCausalLM.from_pretrained(runs / "sharded")
    checkpoint = runs / "sharded" / "checkpoints" / name_of(8)
    written = {
        stem: sum(t.nbytes for t in load_file(checkpoint / f"{stem}-00001-of-00002.safetensors").values() if t.dim())
        for stem in ("model", "optimizer")
    }
    counted = state_bytes(model, 2, sharded=True)
    assert written == {"model": counted["weights"], "optimizer": counted["optimizer"]}


def test_sharded_layers_that_are_computed_again_drop_the_same_numbers(runs):
    assert without_timings(runs / "recomputed") == without_timings(runs / "dropping")
    assert largest_difference(weights_of(runs / "recomputed"), weights_of(runs / "dropping")) == 0
    assert lines_of(runs / "dropping")[1]["loss"] != lines_of(runs / "sharded")[1]["loss"]


def test_sharded_lora_equals_that_of_one_process_resumes_bit_for_bit_and_is_exported_merged(runs):
    """With an embedding that grew: its new rows are the same on all processes. Tolerance: sums in another order."""
    assert_resumes_as(runs / "lora", runs / "plain_lora")
    assert without_timings(runs / "resumed_lora") == without_timings(runs / "lora")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert largest_difference(*(load_file(runs / run / name) for run in ("resumed_lora", "lora"))) == 0
    saved = Shares(runs / "lora" / "checkpoints" / name_of(8), "model")
    adapter = load_file(runs / "lora" / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.{name.replace('.default', '')}" for name in saved.pieces} == adapter.keys()
    model, info = AutoModelForCausalLM.from_pretrained(runs / "lora", output_loading_info=True)
    assert not any(info.values()) and model.config.vocab_size == 301


def test_one_process_that_cannot_write_stops_all_with_a_sentence(runs):
    output = (runs / "output").read_text()
    assert output.count("error: the checkpoint of step 4 cannot be written") == 1
    assert steps_in(runs / "full" / "checkpoints") == []
    assert not list((runs / "full" / "checkpoints").iterdir())


def test_tensors_that_cannot_be_saved_are_not_told_as_a_disk_that_fails(tmp_path):
    weight = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_share({"a": weight, "b": weight}, tmp_path / "model.safetensors", is_main=True)
