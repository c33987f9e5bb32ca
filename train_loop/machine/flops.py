"""Model FLOPs utilisation: the share of a device's arithmetic that a model's own operations use.

N: weights that a token is multiplied with, L: layers, D: width of attention, T: tokens of a block.
"""

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from train_loop.settings import Settings

# dense TFLOP/s with float32 sums, from NVIDIA's data sheets, by a part of torch's name for the device. The first that
# fits counts
PEAK_TFLOPS = {  # bf16 or fp16, TF32
    "B200": (2250, 1100),
    "H200": (989, 494),
    "GH200": (989, 494),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "A10": (125, 62),
    "T4": (65, None),
    "V100": (125, None),
}


def flops_of_block(model: PreTrainedModel, block_size: int) -> float | None:
    """Floating-point operations of training on one block of T tokens: 6 N for each token (2 in the forward pass, 4 in
    the backward pass; 2 there for a frozen weight, which gets no gradient), and 12 L D T for attention's two products,
    as if no score were masked (Chowdhery et al. 2022, PaLM, appendix B, arXiv:2204.02311). The head counts for the
    T - 1 tokens that predict one. Recomputation (gradient_checkpointing) does not count.

    None for a mixture of experts: a token uses only a part of its weights.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    of = lambda weight: (6 if weight.requires_grad else 4) * weight.numel()  # noqa: E731
    of_weights = sum(of(p) for p in model.parameters() if p.dim() > 1 and id(p) not in tables)
    per_token = of_weights + 12 * config.num_hidden_layers * config.hidden_size * block_size
    return per_token * block_size + of(head) * (block_size - 1)


def peak_flops(device: torch.device, mixed_precision: str, tf32: bool) -> float | None:
    """The device's peak operations per second at this precision ("no", "bf16", "fp16"); None for a CPU, an unknown
    device, and float32."""
    if device.type != "cuda" or not (mixed_precision in ("bf16", "fp16") or tf32):
        return None
    name = torch.cuda.get_device_name(device)
    half, single = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), (None, None))
    tflops = half if mixed_precision in ("bf16", "fp16") else single
    return tflops and tflops * 1e12


def mfu_per_token_rate(model: PreTrainedModel, settings: Settings, accelerator: Accelerator) -> float | None:
    """The factor that turns tokens_per_second, of all processes, into the utilisation (0 to 1); None if the device's
    peak or the model's operations are unknown. `settings.peak_tflops` wins over the table."""
    peak = settings.peak_tflops and settings.peak_tflops * 1e12
    peak = peak or peak_flops(accelerator.device, accelerator.mixed_precision, settings.tf32)
    if not peak:
        return None
    flops = flops_of_block(model, settings.block_size)
    return flops and flops / (settings.block_size - 1) / (peak * accelerator.num_processes)
