"""What differs between the versions of the libraries that setup.cfg allows: a function for each difference, which says
from which version on its older half is no longer needed."""

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns on, in place, that each layer of `model` keeps its input alone and is computed again in the backward pass.
    Dropout draws the same numbers again: torch's `preserve_rng_state` is on by default."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # transformers below 5.24, where it has its old name
        model.gradient_checkpointing_enable({"use_reentrant": False})
