"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: small trained matrices beside frozen weights.

A linear layer's weight W [out, in] is frozen. A [r, in] and B [out, r] are trained, and the layer returns
W x + lora_alpha / lora_r * B A dropout(x). B starts at zero, so the model starts unchanged. peft adds A and B to the
model in place: it stays a transformers model, with a few more parameters. `merged` adds the product to W.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from train_loop.errors import UserError
from train_loop.settings import Settings

ADAPTER = "adapter"  # the folder in output_dir that holds the trained matrices alone
ALL = "all-linear"  # peft's name for all linear layers but the head
NAME = "default"  # of the adapter in peft's modules; there is one


def add_lora(model: PreTrainedModel, settings: Settings, has_new_tokens: bool) -> None:
    """Freezes `model` and adds trainable matrices, in place, drawn from `settings.seed`.

    If there are new tokens, the embedding and the head are trained too: frozen rows of new tokens would mean nothing.
    Raises UserError if `lora_target_modules` names something that is not a linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert settings.lora_r is not None
    table: Any = model.get_input_embeddings()  # transformers says Module
    head: Any = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    # a head tied to the embedding is left out: merging would also change the embedding
    known = {name for name, m in layers.items() if m.weight is not table.weight}
    targets = settings.lora_target_modules or [ALL]
    for target in targets if targets != [ALL] else []:
        if not any(f".{name}".endswith(f".{target}") for name in known):
            raise UserError(
                f"lora_target_modules: {model.config.model_type} has no linear layer {target!r} that LoRA can be put "
                f"into. It has {', '.join(sorted({name.rpartition('.')[2] for name in known}))}"
            )
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.model_name_or_path,
        revision=settings.model_revision,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=ALL if targets == [ALL] else targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in layers.values()),  # GPT-2 has its weights transposed
    )
    inject_adapter_in_model(lora, model, NAME)
    if has_new_tokens:
        for parameter in (table.weight, *head.parameters()):
            parameter.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def num_parameters(model: nn.Module) -> int:
    """Number of parameters of the exported model, in which LoRA's matrices are merged."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)


def merged(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: tensor} of an equivalent model without LoRA, by that model's names. `tensors`: those of `model`,
    unsharded."""
    from peft.tuners.lora import Linear

    plain = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            A, B = (tensors[f"{name}.lora_{which}.{NAME}.weight"] for which in "AB")
            product = layer.scaling[NAME] * (B @ A)
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + (product.T if layer.fan_in_fan_out else product)
    return plain


def save_adapter(
    model: PreTrainedModel, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Writes the trained tensors, for peft's `AutoPeftModelForCausalLM.from_pretrained(folder)`. `tensors`: those of
    `model`, unsharded."""
    from safetensors.torch import save_file

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    of_peft = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensors[name] for name in trained}
    folder.mkdir(parents=True)
    save_file(of_peft, folder / "adapter_model.safetensors", {"format": "pt"})
    config: Any = copy.copy(model.peft_config[NAME])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    config.save_pretrained(str(folder))
    if any(".lora_" not in name for name in trained):  # new tokens: peft resizes the embedding to the tokenizer
        tokenizer.save_pretrained(folder)
