"""Settings for a GPU, as far as a CPU shows them: strict determinism, and the utilisation of the device."""

import pytest
import torch
from conftest import TINY, TINY_CONFIGS, lines_of, without_timings
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop.machine import flops
from train_loop.machine.flops import flops_of_block, peak_flops
from train_loop.main import main


def test_strict_determinism_is_on_for_the_run_that_asks_for_it_and_changes_no_number_on_a_cpu(
    text_file, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", "--logging_steps=1", "--max_eval_samples=2"]
    for name, more in (("strict", ["--deterministic"]), ("plain", [])):
        assert main([*arguments, *more, f"--output_dir={tmp_path}/{name}"]) == 0
        assert torch.are_deterministic_algorithms_enabled() == (name == "strict")
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert without_timings(tmp_path / "strict") == without_timings(tmp_path / "plain")


def test_mfu_stands_beside_tokens_per_second_where_the_peak_is_known(text_file, tmp_path):
    """`peak_tflops` of a machine with 1 GFLOP/s. The operations are counted by hand for a GPT-2 of 1 layer, width 32,
    300 tokens, in blocks of 32: 12 x 32 x 32 weights of the layer and the head's 300 x 32."""
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", "--logging_steps=1", "--max_eval_samples=2"]
    assert main([*arguments, "--peak_tflops=0.001", f"--output_dir={tmp_path}/run"]) == 0
    lines = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    of_block = 32 * (6 * 12 * 32**2 + 12 * 1 * 32 * 32) + 31 * 6 * 300 * 32
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] / 31 * of_block / 1e9)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_the_operations_are_those_that_torch_counts(model_type, frozen):
    """Tolerance: attention's backward pass is counted otherwise, and OPT's projections. Frozen are all weights but
    the embedding."""
    from torch.utils.flop_counter import FlopCounterMode

    config = AutoConfig.for_model(model_type, vocab_size=300, **TINY_CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.base_model.parameters() if frozen else ():
        parameter.requires_grad_(parameter is model.get_input_embeddings().weight)
    ids = torch.arange(32)[None]
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=False).logits[:, :-1].sum().backward()
    assert flops_of_block(model, 32) == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_a_mixture_of_experts_has_no_utilisation():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=300, num_local_experts=4, **TINY_CONFIGS["llama"], head_dim=16, sliding_window=None
    )
    with torch.device("meta"):
        assert flops_of_block(AutoModelForCausalLM.from_config(config), 32) is None


def test_peaks_are_of_the_device_and_the_precision(monkeypatch):
    device = torch.device("cuda", 0)
    for name, precision, tf32, peak in (
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989e12),
        ("NVIDIA H100 PCIe", "bf16", False, 756e12),
        ("NVIDIA A100-SXM4-40GB", "no", True, 156e12),
        ("NVIDIA A100-SXM4-40GB", "no", False, None),
        ("NVIDIA L4", "bf16", False, 121e12),
        ("NVIDIA L40S", "bf16", False, 362e12),
        ("Tesla T4", "fp16", False, 65e12),
        ("Tesla T4", "no", True, None),
        ("Another", "bf16", False, None),
    ):
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(device, precision, tf32) == peak
    assert peak_flops(torch.device("cpu"), "bf16", False) is None
