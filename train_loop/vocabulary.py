"""Makes tokenizer and model fit: every token has a row in the embedding, and the special tokens are the same."""

import os
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from train_loop.errors import UserError, num_of, tell
from train_loop.settings import Settings

# architectures whose positions begin after the padding token's id: a model with 514 of them and padding 1 takes 512
AFTER_PADDING = "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"


def size_of_vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of rows that an embedding needs. Ids may have gaps: it may exceed the number of tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def fit_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, str]) -> None:
    """Copies the tokenizer's vocabulary size and special tokens to the config of a model from scratch, except those in
    `overrides` (`config_overrides` by name). Raises UserError if they do not fit the tokenizer."""
    text_config, needed = config.get_text_config(decoder=True), size_of_vocabulary(tokenizer)
    if "vocab_size" not in overrides:
        text_config.vocab_size = needed
    elif text_config.vocab_size < needed:
        raise UserError(
            f"config_overrides: vocab_size is {text_config.vocab_size:,}, but the tokenizer's ids go up to "
            f"{needed - 1:,}. Give at least {needed:,}"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in overrides:
            continue
        token_id, problem = getattr(tokenizer, name), None
        try:  # set even if None: the config's default belongs to another vocabulary
            setattr(config, name, token_id)
        except StrictDataclassError as error:
            problem = error
        if problem or (token_id is None and name == "pad_token_id" and config.model_type in AFTER_PADDING):
            raise UserError(
                f"{config.model_type} needs a {name}, and the tokenizer has none. Give a tokenizer that has one, or "
                f"config_overrides with {name}=ID, the id of a token that your text does not have"
            ) from problem


def give_end_of_text(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Sets the tokenizer's end-of-text token, if it has none, to the one of the pretrained model's config, if that is
    in the vocabulary. Prints a line. `tokenizer` must be the model's own: in a different one the same id means a
    different token."""
    ids = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    token_id = ids[0] if isinstance(ids, list) and ids else ids  # of several, the first ends a text, others a turn
    token = tokenizer.convert_ids_to_tokens(token_id) if isinstance(token_id, int) else None
    if tokenizer.eos_token is None and token is not None:
        tokenizer.eos_token = token
        _say(f"the tokenizer has no end-of-text token: {token!r} ({token_id}) is used, as the model's config says")


def add_new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    own_vocabulary: Callable[[], dict[str, int]],
) -> bool:
    """Enlarges the embedding and head of a pretrained `model`, in place, if `tokenizer` has more tokens. Returns
    whether it did. Prints how many.

    A new row is the mean of the old rows plus a very small random part (transformers' `mean_resizing`, after Hewitt
    2021, "Initializing new word embeddings for pretrained language models"). The weights and `settings.seed` determine
    it. Tied weights stay tied.

    `own_vocabulary` returns {token: id} of the model's own tokenizer, {} if it has none. Raises UserError if
    `tokenizer` is not the model's own with added tokens: its ids then mean other tokens to the model.
    """
    table: Any = model.get_input_embeddings()  # transformers says Module
    old_size, needed = table.num_embeddings, size_of_vocabulary(tokenizer)
    if needed <= old_size:
        return False
    vocabulary = tokenizer.get_vocab()
    new = sorted((i, token) for token, i in vocabulary.items() if i >= old_size)
    some = ", ".join(f"{token!r} ({i})" for i, token in new[:5]) + (", ..." if len(new) > 5 else "")
    if not {token for _, token in new} <= tokenizer.get_added_vocab().keys():  # the base vocabulary is larger
        own = own_vocabulary() if settings.tokenizer_name else {}
        if not own or any(vocabulary.get(token) != i for token, i in own.items()):
            raise UserError(
                f"the tokenizer has tokens beyond the model's vocabulary of {old_size:,}: {some}. It is not the "
                "model's own tokenizer with tokens added, so its ids mean other tokens. Give the model's own one as "
                "tokenizer_name, or a folder to which you saved it after add_tokens"
            )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warning repeats the line printed below
    try:
        torch.manual_seed(settings.seed)
        model.resize_token_embeddings(needed, mean_resizing=True)
    finally:
        logging.set_verbosity(verbosity)
    _say(
        f"the tokenizer has {num_of(len(new), 'token')} more than the model: {some}. The embedding grows from "
        f"{old_size:,} to {needed:,} rows, and each new row begins as the mean of the old ones"
    )
    return True


def _say(sentence: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        tell(f"note: {sentence}")
