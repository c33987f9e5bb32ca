"""Perplexities per word and per byte: of the text that was evaluated, and of nothing else."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, TINY_CONFIGS, lines_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from train_loop.data.blocks import load_split
from train_loop.data.rows import Rows
from train_loop.data.text import covered_text
from train_loop.evaluate import evaluate
from train_loop.main import main
from train_loop.settings.settings import Settings

TEXT = [
    "The king saw a small bird. \n",
    "\n",
    "It sang <unk> all day,\n",
    "é ü\n",
    " and the day after , too\n",
] * 4 + ["The end"]
T = 16


def byte_tokenizer(begin=None, merges=()):
    """One token for each byte, with a token before each row if `begin` says so; "<unk>" in the text is one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<unk>")])
    if begin:
        number = backend.token_to_id(begin)
        backend.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, number)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model():
    """Untrained, with a long reach, and so far from an even guess that what is left out of a sum shows."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", vocab_size=300, **TINY_CONFIGS["llama"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
    return model


def nats_of_each(model, tokens, block_size):
    """[n] float64: of each token given those before it in its block; NaN for the first of a block."""
    nats = np.full((len(tokens) // block_size, block_size), np.nan)
    for row, block in enumerate(torch.tensor(tokens, dtype=torch.long).view(-1, block_size)):
        with torch.no_grad():
            log_p = model(input_ids=block[None, :-1]).logits[0].double().log_softmax(-1)
        nats[row, 1:] = -log_p.gather(1, block[1:, None])[:, 0].numpy()
    return nats.ravel()


def evaluated(model, rows, tokenizer, batch_size=3, **values):
    settings = Settings(named_perplexities=True, block_size=T, per_device_eval_batch_size=batch_size, **values)
    split = load_split(Rows.of(rows), tokenizer, "validation", settings)
    return evaluate(model, split, settings, Accelerator(cpu=True)), split


NAMED = ("word_perplexity", "word_eos_perplexity", "bits_per_byte", "eval_words", "eval_line_ends", "eval_bytes")


def test_some_blocks_have_the_perplexities_of_the_text_that_they_cover(model):
    """The first blocks of a text give what a file gives that ends where they end, counted here by hand."""
    tokenizer = byte_tokenizer()
    text = "".join("" if row.isspace() else row for row in TEXT).replace("<unk>", "the one")
    rows = text.splitlines(keepends=True)
    whole, _ = evaluated(model, rows, tokenizer)
    for num_blocks in (1, 2, 7):
        result, split = evaluated(model, rows, tokenizer, max_eval_samples=num_blocks)
        prefix = text.encode()[: num_blocks * T].decode()
        alone, _ = evaluated(model, prefix.splitlines(keepends=True), tokenizer)
        assert result["eval_bytes"] == num_blocks * T and result["eval_words"] == len(prefix.split())
        assert result["eval_line_ends"] == prefix.count("\n")
        assert result["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-12)
        assert result["word_perplexity"] == pytest.approx(alone["word_perplexity"], rel=1e-12)
        assert result["eval_dropped_tokens"] == 0 and "dropped" not in split.summary()
        assert result["word_perplexity"] != pytest.approx(whole["word_perplexity"], rel=1e-2)
    assert whole["eval_dropped_tokens"] == len(text.encode()) % T > 0
    assert whole["eval_bytes"] == len(text.encode()) - whole["eval_dropped_tokens"]


@pytest.mark.parametrize("begin", [None, "<s>"])
@pytest.mark.parametrize("add_eos_token", [False, True])
def test_special_tokens_are_context_and_no_text(model, begin, add_eos_token):
    """Against the nats of each token by itself. "<unk>" is written in the text, and so it is text."""
    tokenizer = byte_tokenizer(begin)
    result, split = evaluated(model, TEXT, tokenizer, add_eos_token=add_eos_token)
    tokens = split.blocks.ravel()
    nats = nats_of_each(model, tokens, T)
    begins, ends, unknown = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>"])
    assert (begins in tokens, ends in tokens, unknown in tokens) == (begin is not None, add_eos_token, True)
    is_text = (tokens != begins) & (tokens != ends)
    expected = np.nanmean(nats[is_text]) * is_text.sum()
    assert result["eval_text_tokens"] == is_text.sum()
    assert result["eval_text_nats"] == pytest.approx(expected, rel=1e-6)  # float32 rounding
    assert result["eval_loss"] == pytest.approx(np.nanmean(nats), rel=1e-6)
    assert result["bits_per_byte"] == result["eval_text_nats"] / result["eval_bytes"] / math.log(2)
    num_words, num_lines = result["eval_words"], result["eval_line_ends"]
    assert math.log(result["word_perplexity"]) == pytest.approx(result["eval_text_nats"] / num_words)
    assert math.log(result["word_eos_perplexity"]) == pytest.approx(result["eval_text_nats"] / (num_words + num_lines))


def test_a_tokenizer_that_begins_each_row_has_the_perplexities_of_one_that_does_not():
    """A model that gives each of 300 tokens the same probability. A word's perplexity is 300 to the power of its
    tokens, those of white space included."""
    torch.manual_seed(0)
    even = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **TINY_CONFIGS["llama"]))
    torch.nn.init.zeros_(even.get_output_embeddings().weight)
    rows = [row for row in TEXT if not row.isspace()]
    plain, begun, ended = (
        evaluated(even, rows, byte_tokenizer(begin), eval_stride=T - 1, add_eos_token=eos)[0]
        for begin, eos in ((None, False), ("<s>", False), ("<s>", True))
    )
    assert begun["eval_tokens"] > plain["eval_tokens"]
    for name in NAMED:
        # float32 rounding of the nats, times the 23 nats of a word
        assert plain[name] == pytest.approx(begun[name], rel=1e-5) == ended[name], name


def test_words_are_counted_without_line_ends_and_with_them():
    """White space separates words; with line ends as the authors of WikiText count, a row without one has one too."""
    rows = ["a b\n", "\n", " \n", "", "c"]
    text = covered_text(Rows.of(rows), byte_tokenizer(), None, 5)
    assert (text.num_words, text.num_line_ends, text.num_bytes) == (3, 5, 5)
    one_row = covered_text(Rows.of(["a b\n\nc"]), byte_tokenizer(), None, 6)
    assert (one_row.num_words, one_row.num_line_ends, one_row.num_bytes) == (3, 3, 6)


@pytest.mark.parametrize("begin", [None, "<s>"])
@pytest.mark.parametrize("merges", [(), (("a", "y"), ("Ġ", "d"), ("Ġd", "ay"))])
def test_the_text_of_any_number_of_tokens_ends_where_the_last_one_does(begin, merges):
    """For each number of tokens: the bytes of those that stand for text. A character that is cut counts as whole."""
    tokenizer, rows = byte_tokenizer(begin, merges), [row for row in TEXT[:5] if not row.isspace()]
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    pieces = []  # the bytes of each token, none for one that stands for no text
    for row in rows:
        tokens = tokenizer.tokenize(row)
        pieces += [b""] * (begin is not None)
        pieces += [b"<unk>" if token == "<unk>" else bytes(letters[letter] for letter in token) for token in tokens]
        pieces.append(b"")  # the end-of-text token
    text = b"".join(pieces)
    assert text.decode() == "".join(rows)
    byte_ends = []
    for n in range(len(pieces) + 1):
        covered = covered_text(Rows.of(rows), tokenizer, tokenizer.eos_token_id, n)
        assert covered.is_text.tolist() == [piece != b"" for piece in pieces[:n]]
        end = sum(map(len, pieces[:n]))
        while text[end : end + 1] and text[end] & 0xC0 == 0x80:  # within a character
            end += 1
        assert covered.num_bytes == end and covered.num_words == len(text[:end].decode().split())
        byte_ends += [end] * (n > 0)
        assert covered.byte_ends.tolist() == byte_ends
    assert covered.num_line_ends == len(rows)


@pytest.mark.parametrize("values", [{}, {"eval_stride": 5}, {"max_eval_samples": 3}])
@pytest.mark.parametrize("begin", [None, "<s>"])
def test_blocks_add_up_to_the_bits_per_byte_of_the_text(model, begin, values):
    """Nats are float32."""
    result, _ = evaluated(model, TEXT, byte_tokenizer(begin), add_eos_token=True, **values)
    found = result.block_nats["validation"]
    assert found.num_bytes.sum() == result["eval_bytes"] and (found.num_bytes > 0).all()
    assert found.text_nats.sum() == pytest.approx(result["eval_text_nats"], rel=1e-5)
    assert found.nats.sum() == pytest.approx(result["eval_nats"], rel=1e-5)
    other = evaluated(model, TEXT, byte_tokenizer("</s>", (("Ġ", "d"),)), max_eval_samples=2)[0].block_nats[
        "validation"
    ]
    assert found.text == other.text and found.blocks != other.blocks
    assert evaluated(model, TEXT[:-1], byte_tokenizer(begin))[0].block_nats["validation"].text != found.text


def test_the_card_says_which_text_the_perplexities_are_of(text_file, tmp_path):
    arguments = [
        *TINY,
        f"--train_file={text_file}",
        "--max_train_steps=1",
        "--named_perplexities",
        "--max_eval_samples=5",
    ]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    card, last = (tmp_path / "run" / "README.md").read_text(), lines_of(tmp_path / "run")[-1]
    assert last["eval_text_tokens"] == 5 * 32
    words, ends, size = (f"{last[name]:,}" for name in ("eval_words", "eval_line_ends", "eval_bytes"))
    assert "at most 5 blocks (max_eval_samples), after 1 optimizer step: loss" in card
    assert (
        f"of the text of the evaluated blocks: {words} words, {size} bytes" in card and f"its {ends} line ends" in card
    )
    assert f"word eos perplexity {last['word_eos_perplexity']:,.2f}" in card
