"""The cache of tokens, so that later runs start at once.

python -m train_loop.cache list       the size of each file, when a run last opened it, and its path
python -m train_loop.cache clear      removes them all; a run that has one open keeps it until it ends
"""

import sys
import time

from train_loop.data import cached_tokens, clear_cached_tokens, token_folder
from train_loop.errors import num_of


def main(arguments: list[str]) -> int:
    """Exit status."""
    if arguments == ["list"]:
        entries = list(cached_tokens())
        for path, size, used in entries:
            print(f"{size / 1e6:10,.1f} MB  {time.strftime('%Y-%m-%d', time.localtime(used))}  {path}")
        print(
            f"{num_of(len(entries), 'file')}, {sum(size for _, size, _ in entries) / 1e6:,.1f} MB in {token_folder()}"
        )
        return 0
    if arguments == ["clear"]:
        sizes = clear_cached_tokens()
        print(f"{num_of(len(sizes), 'file')}, {sum(sizes) / 1e6:,.1f} MB removed from {token_folder()}")
        return 0
    print(__doc__.strip(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
