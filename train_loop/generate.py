"""Text from an exported folder (or any causal language model):

python -m train_loop.generate runs/quickstart "The value of" --max_new_tokens 50 --num_return_sequences 2
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from train_loop.errors import UserError, one_line, tell
from train_loop.process import safe_console
from train_loop.report import text_after
from train_loop.tuning import sharing_cores


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one sentence if there is no usable model."""
    with safe_console(), sharing_cores():
        try:
            generate(argv)
        except UserError as error:
            tell(f"error: {error}")
            return 1
    return 0


def generate(argv: list[str] | None) -> None:
    """Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder or hub name of a causal language model")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="tokens to add")
    parser.add_argument("--num_return_sequences", type=int, default=1, help="continuations to write")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="below 1: less surprising; 0: always the likeliest token"
    )
    parser.add_argument("--top_k", type=int, default=50, help="choose among this many likeliest tokens; 0: among all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="choose among the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the choices")
    arguments = parser.parse_args(argv)
    for name, low in (("max_new_tokens", 1), ("num_return_sequences", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(arguments, name) < low:
            parser.error(f"--{name} must be at least {low}")
    if not 0 < arguments.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")

    folder = Path(arguments.model)
    if (folder / "train_config.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"the run in {folder} has not exported its model yet. To finish it: its command with "
            "--resume_from_checkpoint auto"
        )
    from transformers import logging, pipeline, set_seed  # imported here: --help and a typo answer at once

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # False: the default asks on the terminal, and one key would run the code
        generator = pipeline("text-generation", model=arguments.model, trust_remote_code=False)
    except Exception as error:  # the loaders' errors have no common class
        raise UserError(
            f"no model can be loaded from {arguments.model}: {one_line(error)}. Give a folder that a run exported, or "
            "a name on the hub"
        ) from error
    set_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, **{n: getattr(arguments, n) for n in ("temperature", "top_k", "top_p")}}
    elif arguments.num_return_sequences > 1:
        parser.error("--temperature 0 gives one continuation only: leave out --num_return_sequences")
    tokenizer: Any = generator.tokenizer
    prompt_ids = tokenizer(arguments.prompt)["input_ids"]
    found = generator(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        num_return_sequences=arguments.num_return_sequences,
        return_tensors=True,
        **sampling,
    )
    new_ids = [one["generated_token_ids"][len(prompt_ids) :] for one in found]
    texts = [arguments.prompt + text_after(prompt_ids, ids, tokenizer) for ids in new_ids]
    print("\n---\n".join(texts))


if __name__ == "__main__":
    sys.exit(main())
