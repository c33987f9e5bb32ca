"""TRL's SFTTrainer with a model and blocks of tokens: `peers_trl.py FOLDER float32|bf16 BATCH STEPS CHECKPOINTING`.
Its defaults hold, but for what is given here. Prints {"loss", "seconds": of each step} as JSON.
"""

import itertools
import json
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

folder, precision, batch, num_steps, checkpointing = *sys.argv[1:3], *map(int, sys.argv[3:])
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.eos_token
times = []


class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        times.append(time.perf_counter())


trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    args=SFTConfig(
        folder + "/trl",
        per_device_train_batch_size=batch,
        max_steps=num_steps,
        learning_rate=2e-5,
        weight_decay=0.01,
        bf16=precision == "bf16",
        gradient_checkpointing=bool(checkpointing),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"input_ids": np.load(folder + "/blocks.npy").tolist()}),
    processing_class=tokenizer,
    callbacks=[Clock()],
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(json.dumps({"loss": float(losses[-1]), "seconds": [b - a for a, b in itertools.pairwise(times)][1:]}))
