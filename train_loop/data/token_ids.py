"""What the tokenizer makes of texts."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast


def is_plain(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the class leaves a fast tokenizer's call unchanged. Then the ids are those of its Rust part, which can be
    called directly: without lists of masks and strings, and by two threads, which Python code may not allow."""
    # two of these names are private: if transformers moves them, no tokenizer is plain, which is only slower
    methods = ("__call__", "_encode_plus", "_convert_encoding")
    own = [getattr(type(tokenizer), name, None) for name in methods]
    return None not in own and own == [getattr(PreTrainedTokenizerFast, name, None) for name in methods]


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool = True
) -> Iterable[list[int]]:
    """The ids of each text, as `tokenizer(text)` gives them."""
    if is_plain(tokenizer):
        found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return (encoding.ids for encoding in found)
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, **options)["input_ids"]
