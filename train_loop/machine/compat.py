"""Differences between the versions of the libraries that setup.cfg allows. One function for each; it says from which
version on the code for older ones can go."""

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns on gradient checkpointing in place: each layer of `model` keeps only its input and is computed again in the
    backward pass. Dropout draws the same numbers again: torch's `preserve_rng_state` is on by default."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # transformers below 5.24, where it has its old name
        model.gradient_checkpointing_enable({"use_reentrant": False})
