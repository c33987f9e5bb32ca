"""A run with a mistake in the code: process 1 raises an error, in step 3 ("training") or when all steps are done
("end"). The first argument says which."""

import os
import sys

from train_loop import main
from train_loop.report import Metrics


def fail(*arguments, **options):
    raise RuntimeError("size mismatch in skip_connection.weight")


def fails_on_1(plain):
    return fail if os.environ["RANK"] == "1" else plain


moment = sys.argv.pop(1)
if moment == "training":
    plain = Metrics.count_step
    Metrics.count_step = lambda self, step, *rest: (fails_on_1(plain) if step == 3 else plain)(self, step, *rest)
elif moment == "end":
    Metrics.finish = fails_on_1(Metrics.finish)
try:
    status = main.main()
except Exception:
    status = 1
main.leave(status)
