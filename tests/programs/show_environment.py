"""Stands in the loop's place: writes what the launcher put into the environment to the file of the first argument,
with the rank as its suffix."""

import json
import os
import sys
from pathlib import Path

names = {"precision": "ACCELERATE_MIXED_PRECISION", "cpu": "ACCELERATE_USE_CPU", "fsdp": "ACCELERATE_USE_FSDP"}
names |= {"fsdp_version": "FSDP_VERSION"}
shown = {key: os.environ[name] for key, name in names.items() if name in os.environ}
shown |= {key: int(os.environ.get(key.upper(), 1)) for key in ("world_size", "local_world_size")}
Path(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}").write_text(json.dumps(shown))
