"""A `transformers.Trainer` of one step, for the model and text of a folder. Prints when the step was done."""

import sys
import time

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = load_dataset("text", data_files=folder + "/data.txt", split="train", keep_linebreaks=True)
rows = rows.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")


def group_texts(rows):
    joined = {name: sum(values, []) for name, values in rows.items()}  # noqa: RUF017  as run_clm does it
    length = len(joined["input_ids"]) // 128 * 128
    blocks = {name: [v[i : i + 128] for i in range(0, length, 128)] for name, v in joined.items()}
    return blocks | {"labels": blocks["input_ids"]}


blocks = rows.map(group_texts, batched=True)
model = AutoModelForCausalLM.from_pretrained(folder)
arguments = TrainingArguments(
    folder + "/trainer",
    per_device_train_batch_size=8,
    max_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
Trainer(model=model, args=arguments, train_dataset=blocks, data_collator=default_data_collator).train()
print("FIRST STEP", time.time())
