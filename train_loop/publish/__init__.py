"""The model of a run as others load it: in output_dir, with its card, and on the hub.

publisher.py   weights, config, tokenizer and card in a folder; checkpoints on the hub
model_card.py  the README.md of that folder
push.py        a folder to the hub
"""

from train_loop.publish.publisher import Publisher
from train_loop.publish.upload import push

__all__ = ["Publisher", "push"]
