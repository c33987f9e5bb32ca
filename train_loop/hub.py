"""The hub that models and data sets are asked for by name. Nothing here imports its client."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

CONNECT_SECONDS = 5


def hub_address():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def use_cache_if_unreachable(settings):
    """Sets HF_HUB_OFFLINE=1 where `settings` name something on a hub that cannot be reached; returns whether it did.

    The hub's client would ask again and again for half a minute for each file; offline, it looks into its cache at
    once. It reads the variable when it is imported: call this before.
    """
    names = [settings.model_name_or_path, settings.config_name, settings.tokenizer_name, settings.dataset_name]
    names = [name for name in names if name and name != "python_docs" and not Path(name).exists()]
    address = urlsplit(hub_address())
    if not names or "HF_HUB_OFFLINE" in os.environ or getproxies().get(address.scheme):
        return False
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname, port), CONNECT_SECONDS).close()
        return False
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return True
