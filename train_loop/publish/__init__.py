"""The exported model: in output_dir, with its model card, and on the hub.

publisher.py   weights, config, tokenizer and card in a folder; checkpoints on the hub
model_card.py  the README.md of that folder
upload.py      a folder to the hub
"""

from train_loop.publish.publisher import EXPORT_PARTIAL, Publisher
from train_loop.publish.upload import damage_of_export, push

__all__ = ["EXPORT_PARTIAL", "Publisher", "damage_of_export", "push"]
