"""What the model writes while it trains (`--sample_prompt`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train_loop.errors import UserError
from train_loop.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

NUM_NEW_TOKENS = 40


def text_after(prompt_ids: list[int], new_ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of `new_ids` after a prompt, without special tokens. Both are decoded together: a tokenizer like
    SentencePiece leaves out the space before the first token that it decodes."""
    prompt, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt_ids, [*prompt_ids, *new_ids])
    )
    return whole[len(prompt) :]


class Samples:
    """The prompts of a run as tokens. Raises UserError for a prompt without any."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.context = tokenizer, settings.block_size
        self.prompts = {prompt: self._encode(prompt) for prompt in settings.sample_prompt or []}

    def _encode(self, prompt: str) -> list[int]:
        """The prompt's tokens, as rows are tokenised but without an end-of-text token after them: the text
        continues."""
        if not prompt.isascii() and prompt != prompt.encode(errors="replace").decode():  # e.g. a shell's Latin-1
            raise UserError(f"sample_prompt {prompt!r} is not UTF-8 text")
        ids = self.tokenizer(prompt)["input_ids"]
        end = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == end and not prompt.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        if not ids:
            raise UserError(f"sample_prompt {prompt!r} has no tokens: give a prompt that this tokenizer knows")
        return ids

    def write(self, model: torch.nn.Module, device: torch.device) -> dict[str, str]:
        """{prompt: its continuation, always by the likeliest token, up to an end of text}, from the last `block_size`
        tokens each time.

        It does not change training: the model's mode is restored and no random number is drawn. All processes call it
        and make the same number of passes, whatever text comes out, because the model may be sharded.
        """
        import torch  # imported here: `compare` need not wait for it

        was_training = model.training
        model.eval()
        written = {}
        with torch.no_grad():
            for prompt, prompt_ids in self.prompts.items():
                ids = torch.tensor([prompt_ids], device=device)
                for _ in range(NUM_NEW_TOKENS):
                    logits = model(input_ids=ids[:, -self.context :], use_cache=False).logits  # [1, T, V]
                    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
                new = ids[0, -NUM_NEW_TOKENS:].tolist()
                if self.tokenizer.eos_token_id in new:
                    new = new[: new.index(self.tokenizer.eos_token_id)]
                written[prompt] = text_after(prompt_ids, new, self.tokenizer)
        model.train(was_training)
        return written
