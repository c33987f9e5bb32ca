"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: small trained matrices beside frozen weights.

A linear layer's weight W [out, in] stays as it is. Beside it A [r, in] and B [out, r] are trained, and the layer gives
W x + lora_alpha / lora_r * B A dropout(x). B begins as zeros, so the model begins as it was. peft puts them into the
model in place: it stays a model of transformers, with a few more parameters. `merged` adds the product to W.
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
    """Freezes `model`, and puts trained matrices into it, in place, drawn from `settings.seed`.

    Where the embedding has rows of new tokens, it is trained too, and the head with it: frozen rows would mean nothing.
    Raises UserError if `lora_target_modules` names what is no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert settings.lora_r is not None
    table: Any = model.get_input_embeddings()  # transformers says Module
    head: Any = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    # a head that is tied to the embedding is left out: merging would change the embedding, too
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
    """Of the model that is exported: the matrices beside the weights are merged there."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)


def merged(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model without LoRA that computes what `model` does, by the names that they have there.
    `tensors`: those of `model`, unsharded."""
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
    """Writes what was trained, as peft's `AutoPeftModelForCausalLM.from_pretrained(folder)` reads it. `tensors`: those
    of `model`, unsharded."""
    from safetensors.torch import save_file

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    of_peft = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensors[name] for name in trained}
    folder.mkdir(parents=True)
    save_file(of_peft, folder / "adapter_model.safetensors", {"format": "pt"})
    config: Any = copy.copy(model.peft_config[NAME])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    config.save_pretrained(str(folder))
    if any(".lora_" not in name for name in trained):  # rows of new tokens: peft makes room for them by the tokenizer
        tokenizer.save_pretrained(folder)
