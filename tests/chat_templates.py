"""A tokenizer of bytes and three chat templates, for tests and for the comparison with TRL."""

from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train_loop.data.marks import NOT_A_TARGET, ROW_BEGINS, has_mark, ids_of

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|end_header|>", "<|eot|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ '<|begin|>' }}{% endif %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\n\n' }}{% endif %}"
)
MARKED = (  # as ChatML, but the line end after an answer is no part of it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "marked": MARKED}


def byte_tokenizer(template=None, merges=()):
    """A token for each byte, for each of `SPECIAL`, and for each pair of tokens in `merges`."""
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [*merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0], chat_template=template
    )


def messages(*contents, system=None):
    """A chat in which user and assistant take turns, the user first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def shown(tokens, tokenizer):
    """The text of tokens: a row begins with "¦", and targets stand between "«" and "»"."""
    is_target, begins = ~has_mark(tokens, NOT_A_TARGET), has_mark(tokens, ROW_BEGINS)
    edges = [0, *(i for i in range(1, len(tokens)) if begins[i] or is_target[i] != is_target[i - 1]), len(tokens)]
    parts = []
    for first, end in pairwise(edges):
        text = tokenizer.decode(ids_of(tokens[first:end]))
        parts.append("¦" * bool(begins[first]) + (f"«{text}»" if is_target[first] else text))
    return "".join(parts)
