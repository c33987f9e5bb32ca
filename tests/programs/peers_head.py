"""This loop with somebody else's loss of the hidden states in training, in the place of `head.py`'s own:
`peers_head.py NAME`, then main.py's arguments. The objective is plain cross entropy.
"""

import functools
import sys
from typing import Any

from train_loop import tuning

tuning.keep_memory()  # before torch is imported, as main.py does

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from train_loop import head, loss  # noqa: E402
from train_loop.main import leave, main  # noqa: E402

name = sys.argv.pop(1)
if name == "cut-cross-entropy":
    from cut_cross_entropy import linear_cross_entropy

    their_loss = functools.partial(linear_cross_entropy, impl="torch_compile", reduction="sum")
elif name == "liger-kernel":
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    their_loss = functools.partial(liger_fused_linear_cross_entropy, reduction="sum")
else:
    options = torch.nn.LinearCrossEntropyOptions()
    their_loss = functools.partial(torch.nn.functional.linear_cross_entropy, options=options, reduction="sum")


class TheirLoss:
    """Called as `head._LinearInChunks` is."""

    ours = head._LinearInChunks

    @classmethod
    def apply(cls, hidden: Tensor, weight: Tensor, bias: None, rows: Any, needs_grad: bool) -> Tensor:
        if rows.objectives != (loss.objective,):  # evaluation
            return cls.ours.apply(hidden, weight, bias, rows, needs_grad)
        if torch.is_autocast_enabled("cpu"):  # not each of these libraries follows it by itself
            hidden, weight = (x.to(torch.get_autocast_dtype("cpu")) for x in (hidden, weight))
        total = their_loss(hidden, weight, rows.targets).float()
        rows.sums.append({"": total.detach()})
        return total


head._LinearInChunks = TheirLoss
leave(main())
