"""A run whose process 1 never joins: process 0 waits for it, in C code. Each writes its process number to
<output_dir>.<rank>."""

import os
import time
from pathlib import Path

from train_loop import main, run

plain = run.build_accelerator


def build_accelerator(settings):
    Path(f"{settings.output_dir}.{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(300 if os.environ["RANK"] == "1" else 0)
    return plain(settings)


run.build_accelerator = build_accelerator
main.leave(main.main())
