"""The choices that some settings have."""

# the schedules of the learning rate, and the parameters that lr_scheduler_kwargs may give to each, with their defaults
SCHEDULES: dict[str, dict[str, float]] = {
    "linear": {"min_lr_ratio": 0.0},  # share of learning_rate that is left at the end
    "cosine": {"num_cycles": 0.5, "min_lr_ratio": 0.0},  # 0.5: down once
    "cosine_with_restarts": {"num_cycles": 1.0, "min_lr_ratio": 0.0},
    "polynomial": {"power": 1.0, "lr_end": 1e-7},  # lr_end: learning rate at the end, as transformers has it
    "constant": {},
    "constant_with_warmup": {},
    "wsd": {"decay_ratio": 0.1, "min_lr_ratio": 0.0},  # warm-up, stable, decay: linear in this share of all steps
}
# Accelerate has a class for each of these, and each is the name of the library to import
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
