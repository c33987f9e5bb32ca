"""Tokenizer and model: from the hub, a folder, a GGUF file or only a config. Add a teacher or frozen weights here.

Weights are always float32, also if the checkpoint is not: half precision would round most of an update away. The launch
config can set a lower precision for the forward and backward passes (autocast).
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (  # type: ignore[attr-defined]  # mypy cannot see these exports
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    GPT2TokenizerFast,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from train_loop.data import Source, texts_of
from train_loop.errors import UserError, num_of, one_line, warn
from train_loop.hub import hub_address
from train_loop.machine import checkpoint_activations
from train_loop.probes import is_causal, keeps_documents_apart
from train_loop.settings import Settings
from train_loop.vocabulary import AFTER_PADDING, add_new_tokens, fit_config, give_end_of_text

END_OF_TEXT = "<|endoftext|>"


def load_config(settings: Settings) -> PreTrainedConfig:
    """The model's config, with `config_overrides` applied. Raises UserError if there is no config, if it is not of a
    causal language model, or if `block_size` is above the model's number of positions."""
    for setting, package, oldest in (("gguf_file", "gguf", "0.19"), ("lora_r", "peft", "0.21")):
        if getattr(settings, setting) and importlib.util.find_spec(package) is None:
            raise UserError(f'{setting} needs the package {package}: python -m pip install "{package}>={oldest}"')
    if settings.model_type:
        try:
            config = AutoConfig.for_model(settings.model_type)
        except ValueError as error:
            raise UserError(f"model_type {settings.model_type} is not an architecture of transformers") from error
    else:
        name = settings.model_name_or_path or settings.config_name
        assert name is not None  # one of them is given (`contradictions`)
        config = _load(AutoConfig, name, settings, "model config", **_origin(settings))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        raise UserError(
            f"{settings.model_type or name}: transformers has no causal language model of the architecture "
            f"{config.model_type}. Give a model that predicts the next token, such as gpt2 or llama"
        )
    _override(config, _overrides(settings))
    _check_sizes(config, settings)
    return config


def load_tokenizer(
    settings: Settings,
    train_rows: Iterable[dict[str, Any]] | Source | None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer: the named one, the model's own, or a byte-level BPE trained on `train_rows`. If the model's own
    has no end-of-text token, it gets that of the model's `config`.

    Raises UserError if there is none, or only a slow one.
    """
    if settings.tokenizer_vocab_size:
        assert isinstance(train_rows, Iterable)  # a stream trains no tokenizer (`contradictions`)
        return _train_tokenizer(train_rows, settings.tokenizer_vocab_size)
    name = settings.tokenizer_name or settings.model_name_or_path or settings.config_name
    assert name is not None  # one of them is given (`contradictions`)
    folder = Path(name)
    if (folder / "vocab.json").is_file() and not any(
        (folder / f).is_file() for f in ("tokenizer.json", "config.json", "tokenizer_config.json")
    ):
        # GPT-2's two original files name no class, so AutoTokenizer cannot load them
        return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    origin = {} if settings.tokenizer_name else _origin(settings)
    tokenizer = _load(AutoTokenizer, name, settings, "tokenizer", **origin)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name} is a slow one (no tokenizer.json): only fast tokenizers are supported")
    if not tokenizer("text")["input_ids"]:  # transformers makes an empty one out of a config without its files
        raise UserError(f"{name} holds no usable tokenizer: it has no vocabulary")
    if config is not None and settings.model_name_or_path and not settings.tokenizer_name:
        give_end_of_text(tokenizer, config)
    return tokenizer


def load_model(settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The causal language model in float32, with an embedding row for every token.

    From scratch: `settings.seed` gives its weights, and its vocabulary is the tokenizer's, or a larger one from
    `config_overrides`. A pretrained model's vocabulary grows if the tokenizer has new tokens. Raises UserError if
    weights are missing or do not fit, if the tokenizer is a different model's, or if the model sees the tokens that it
    must predict.
    """
    torch.manual_seed(settings.seed)
    has_new_tokens = False
    if settings.model_name_or_path:
        model = _pretrained_model(settings, config)
        has_new_tokens = add_new_tokens(model, tokenizer, settings, lambda: _own_vocabulary(settings))
    else:
        fit_config(config, tokenizer, _overrides(settings))
        _check_sizes(config, settings)
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
            )
        except Exception as error:  # architectures raise any class for unsupported sizes
            raise UserError(
                f"a {config.model_type} model cannot be made "
                + (
                    f"with config_overrides {settings.config_overrides}"
                    if settings.config_overrides
                    else "from its config"
                )
                + f": {type(error).__name__}: {one_line(error)}"
            ) from error
    if not is_causal(model):
        raise UserError(_say_not_causal(config, settings))
    if settings.lora_r:
        from train_loop.lora import add_lora  # only here: peft need not be installed

        add_lora(model, settings, has_new_tokens)
    if settings.tuning:
        from train_loop.lean import use_lean_modules  # only here: without tuning no internals of transformers are used

        use_lean_modules(model)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"gradient_checkpointing: transformers does not have it for {config.model_type}")
        checkpoint_activations(model)
    if settings.document_attention and not keeps_documents_apart(model):
        raise UserError(
            f"document_attention: the attention of {config.model_type} cannot keep the documents of a block apart"
        )
    return model


def _origin(settings: Settings) -> dict[str, Any]:
    """The loaders' options that say where in `model_name_or_path` the model is."""
    return {"revision": settings.model_revision} | ({"gguf_file": settings.gguf_file} if settings.gguf_file else {})


def _load(loader: Any, name: str, settings: Settings, what: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **options)
    except Exception as error:  # the loaders' errors have no common class
        if "trust_remote_code=True" in str(error):
            raise UserError(
                f"{name} comes with Python code of its own: read it, and give --trust_remote_code to run it"
            ) from error
        if Path(name).is_dir():
            raise UserError(f"the folder {name} holds no usable {what}: {one_line(error)}") from error
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise UserError(f"{what} {name!r} cannot be loaded: there is no such folder") from error
        raise UserError(
            f"{what} {name!r} cannot be loaded: it is not a folder here, not in the cache, and cannot be downloaded "
            f"from {hub_address()} ({one_line(error)}). Without the hub: give the path of a folder, or fill the cache "
            "on a machine that reaches it and set HF_HUB_OFFLINE=1"
        ) from error


def _own_vocabulary(settings: Settings) -> dict[str, int]:
    """{token: id} of the tokenizer that comes with the model, {} if there is none."""
    name = str(settings.model_name_or_path)
    try:
        return _load(AutoTokenizer, name, settings, "tokenizer", **_origin(settings)).get_vocab()
    except UserError:
        return {}


def _pretrained_model(settings: Settings, config: PreTrainedConfig) -> PreTrainedModel:
    name = str(settings.model_name_or_path)
    model, info = _load(
        AutoModelForCausalLM,
        name,
        settings,
        "model",
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        # a GGUF file is dequantised once, when it is loaded: quantised weights cannot be trained
        quantization_config=GgufConfig(dequantize=True) if settings.gguf_file else None,
        **_origin(settings),
    )
    if missing := sorted(info["missing_keys"]):  # transformers would only warn, and draw them at random
        raise UserError(f"model {name} lacks {num_of(len(missing), 'weight')}, e.g. {missing[0]}")
    if (unused := sorted(info["unexpected_keys"])) and int(os.environ.get("RANK", 0)) == 0:  # e.g. an encoder's
        warn(
            f"model {name}: {type(model).__name__} has no place for {num_of(len(unused), 'weight')} of the "
            f"checkpoint, e.g. {unused[0]}. What has no place is neither trained nor exported"
        )
    return model


def _check_sizes(config: PreTrainedConfig, settings: Settings) -> None:
    """Raises UserError if `block_size` is above the model's number of positions, or if attention heads cannot share
    keys and values: transformers would build such a model and fail in its first forward pass."""
    text_config = config.get_text_config(decoder=True)
    num_heads, num_shared = (getattr(text_config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if num_heads and num_shared and num_heads % num_shared:
        raise UserError(
            f"{config.model_type} cannot have {num_of(num_heads, 'attention head')} with num_key_value_heads "
            f"{num_shared}: give num_key_value_heads that divides {num_heads}"
        )
    positions = getattr(text_config, "max_position_embeddings", None) or getattr(
        text_config, "max_target_positions", None
    )
    reserved = 0
    if config.model_type in AFTER_PADDING and config.pad_token_id is not None:
        reserved = config.pad_token_id + 1
    # -1 (XLNet): no limit
    if positions and positions > 0 and settings.block_size > positions - reserved:
        why = f" ({positions} less the {reserved} up to the padding token's id)" if reserved else ""
        raise UserError(
            f"block_size is {settings.block_size}, but the model has {positions - reserved} positions{why}: give "
            "block_size that many or fewer"
        )


def _say_not_causal(config: PreTrainedConfig, settings: Settings) -> str:
    name = settings.model_name_or_path
    way_on = "Give a model that predicts the next token, such as gpt2 or llama"
    for switch in ("is_decoder", "causal"):
        if getattr(config, switch, None) is False:
            where = f'the config.json of {name} with "{switch}": true' if name else f"config_overrides {switch}=true"
            way_on = f"Its attention is causal with {where}"
    return (
        f"{name or config.model_type} is not a causal model: its logits at a position change with the tokens after it, "
        f"so it sees the tokens that it is to predict. {way_on}"
    )


def _overrides(settings: Settings) -> dict[str, str]:
    """`config_overrides` as {name: text}."""
    parts = settings.config_overrides.split(",") if settings.config_overrides else []
    return {name.strip(): text.strip() for name, _, text in (part.partition("=") for part in parts)}


def _override(config: PreTrainedConfig, overrides: dict[str, str]) -> None:
    for name, text in overrides.items():
        old = getattr(config, name, None)
        try:
            value = json.loads(text.lower() if text in ("True", "False", "None") else text)
        except ValueError:
            value = text
        try:
            if not hasattr(config, name) or (isinstance(old, (int, float)) and not isinstance(value, (int, float))):
                raise ValueError
            setattr(config, name, value)
        except (ValueError, StrictDataclassError) as error:
            raise UserError(
                f"config_overrides: '{name}={text}' does not fit a {config.model_type} config"
                + (f", which has {name}={json.dumps(old, default=str)}" if hasattr(config, name) else "")
            ) from error


def _train_tokenizer(rows: Iterable[dict[str, Any]], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in texts_of(row["text"] or "")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
