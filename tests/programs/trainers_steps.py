"""`transformers.Trainer` with a model and blocks of tokens. Prints {"loss", "seconds": of each step or of the
evaluation, "device_peak": GiB} as JSON.
"""

import itertools
import json
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

folder, data, precision, batch, num_steps, evaluate = *sys.argv[1:4], *map(int, sys.argv[4:])
blocks = [{"input_ids": block, "labels": block} for block in torch.from_numpy(np.load(data))]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model.loss_type = "ForCausalLM"  # counts a block's targets as it does for other models: 127, not 128
times = []


class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        times.append(time.perf_counter())


trainer = Trainer(
    model=model,
    args=TrainingArguments(
        folder + "/trainer",
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=num_steps,
        learning_rate=2e-5,
        weight_decay=0.01,
        seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        prediction_loss_only=True,
        bf16=precision == "bf16",
        tf32=True if precision == "tf32" else None,
    ),
    train_dataset=blocks,
    eval_dataset=blocks,
    data_collator=default_data_collator,
    callbacks=[Clock()],
)
if evaluate:
    began = time.perf_counter()
    done = {"loss": trainer.evaluate()["eval_loss"], "seconds": [time.perf_counter() - began]}
else:
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    done = {"loss": float(losses[-1]), "seconds": [b - a for a, b in itertools.pairwise(times)][1:]}
if torch.cuda.is_available():
    done["device_peak"] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(done))
