"""Tokenizer and model: from the hub, a folder, a GGUF file or a config alone. This is the place for LoRA, a teacher or
frozen weights.

Weights are float32 whatever a checkpoint holds: half-precision weights would round most of an update away. Lower
precision in the forward and backward passes is the launch config's affair (autocast).
"""

import importlib.util
import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
)

from train_loop.errors import UserError, one_line
from train_loop.hub import hub_address
from train_loop.lean import use_lean_modules

END_OF_TEXT = "<|endoftext|>"


def load_config(settings):
    """The model's `PretrainedConfig`. Raises UserError where there is none, or where a block is longer than the
    positions that the model has."""
    if settings.gguf_file and importlib.util.find_spec("gguf") is None:
        raise UserError('gguf_file needs the package gguf: python -m pip install "gguf>=0.19"')
    if settings.model_type:
        try:
            config = AutoConfig.for_model(settings.model_type)
        except ValueError as error:
            raise UserError(f"model_type {settings.model_type} is not an architecture of transformers") from error
    else:
        name = settings.model_name_or_path or settings.config_name
        config = _load(AutoConfig, name, settings, "model config", **_origin(settings))
    if settings.config_overrides:
        _override(config, settings.config_overrides)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.block_size > positions:
        raise UserError(f"block_size is {settings.block_size}, but the model has {positions} positions")
    return config


def load_tokenizer(settings, train_rows):
    """A fast tokenizer: the one named, the model's own, or a byte-level BPE trained on `train_rows`.

    Raises UserError where there is none, or it is a slow one.
    """
    if settings.tokenizer_vocab_size:
        return _train_tokenizer(train_rows, settings.tokenizer_vocab_size)
    name = settings.tokenizer_name or settings.model_name_or_path or settings.config_name
    folder = Path(name)
    if (folder / "vocab.json").is_file() and not any(
        (folder / f).is_file() for f in ("tokenizer.json", "config.json", "tokenizer_config.json")
    ):
        # GPT-2's original two files name no class, and AutoTokenizer cannot know them
        return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    origin = {} if settings.tokenizer_name else _origin(settings)
    tokenizer = _load(AutoTokenizer, name, settings, "tokenizer", **origin)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name} is a slow one (no tokenizer.json): only fast tokenizers are supported")
    if not tokenizer("text")["input_ids"]:  # transformers makes an empty one out of a config without its files
        raise UserError(f"{name} holds no usable tokenizer: it has no vocabulary")
    return tokenizer


def load_model(settings, config, tokenizer):
    """The causal language model in float32, with a place in its vocabulary for every token.

    From scratch its weights are drawn from `settings.seed`, and its vocabulary is the tokenizer's.
    Raises UserError where weights are missing or do not fit, or the tokenizer has tokens that the model lacks.
    """
    torch.manual_seed(settings.seed)
    if settings.model_name_or_path:
        model, info = _load(
            AutoModelForCausalLM,
            settings.model_name_or_path,
            settings,
            "model",
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            # a GGUF file's blocks of few bits become numbers, once and for all: blocks cannot be trained
            quantization_config=GgufConfig(dequantize=True) if settings.gguf_file else None,
            **_origin(settings),
        )
        if missing := sorted(info["missing_keys"]):  # transformers would draw them at random, with a warning
            raise UserError(
                f"model {settings.model_name_or_path} lacks {len(missing)} of its weights, e.g. {missing[0]}"
            )
    else:
        config.get_text_config().vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
        )
    if settings.tuning:
        use_lean_modules(model)
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer):,} tokens, but the model's vocabulary only {vocab_size:,}")
    if settings.document_attention and not keeps_documents_apart(model):
        raise UserError(
            f"document_attention: the attention of {config.model_type} does not keep to the documents of a block"
        )
    model.config.use_cache = False  # keys and values are for generation; put back by `save_model`
    return model


def save_model(model, state_dict, folder):
    """Writes the config and the weights of `state_dict`, which are `model`'s, into `folder` as `from_pretrained` and
    generation want them."""
    model.config.use_cache = True
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        model.config.use_cache = False


@torch.no_grad()
def keeps_documents_apart(model):
    """Whether a document's logits are the same alone and after another one in a block, when `position_ids` begin anew.

    Tried out, not looked up: a model may accept positions and not mask by them, or carry a state along."""
    ids = torch.arange(12)[None] * 7 % model.get_input_embeddings().num_embeddings
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    was_training = model.training
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:]
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits
    except TypeError:  # the model takes no positions
        return False
    finally:
        model.train(was_training)
    return torch.allclose(packed, alone, rtol=1e-4, atol=1e-4 * alone.std().item())


def _origin(settings):
    """Where in `model_name_or_path` the model is, as the loaders' options."""
    return {"revision": settings.model_revision} | ({"gguf_file": settings.gguf_file} if settings.gguf_file else {})


def _load(loader, name, settings, what, **options):
    try:
        return loader.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **options)
    except Exception as error:  # the loaders' errors have no common class
        if "trust_remote_code=True" in str(error):
            raise UserError(
                f"{name} comes with Python code of its own: read it, and give --trust_remote_code to run it"
            ) from error
        if Path(name).is_dir():
            raise UserError(f"the folder {name} holds no usable {what}: {one_line(error)}") from error
        raise UserError(
            f"{what} {name!r} cannot be loaded: it is no folder here, not in the cache, and could not be had from "
            f"{hub_address()} ({one_line(error)}). Without the hub: give the path of a folder, or fill the cache on a "
            "machine that reaches it and set HF_HUB_OFFLINE=1"
        ) from error


def _override(config, overrides):
    for part in overrides.split(","):
        name, _, text = part.strip().partition("=")
        old = getattr(config, name, None)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if not hasattr(config, name) or (isinstance(old, (int, float)) and not isinstance(value, (int, float))):
            raise UserError(f"config_overrides: {part.strip()!r} does not fit a {config.model_type} config")
        setattr(config, name, value)


def _train_tokenizer(rows, vocab_size):
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
    tokenizer.train_from_iterator((row["text"] or "" for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
