"""Train with PE-DyRA in a Hugging Face Trainer: python launcher/hf_trainer.py MODEL DATA.jsonl OUTPUT [STEPS]."""

import sys

import transformers
from datasets import load_dataset

from dynrank_ds.integrations.hf import DynamicRankCallback

path, data, output, steps = [*sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 200]
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
callback = DynamicRankCallback(
    model,
    method={"name": "pe_dyra", "t_i": 0.2, "interval": 0.1, "t_f": 0.3, "k": 5},
    adapter={"rank": 4, "alpha": 8.0},
)
rows = load_dataset("json", data_files=data, split="train")
dataset = rows.map(
    lambda row: tokenizer(f"{row['query']} {row['response']}", truncation=True, max_length=512),
    remove_columns=rows.column_names,
)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=4, save_strategy="no", report_to=[]
    ),
    transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    dataset,
    callbacks=[callback],
    optimizers=(callback.optimizer(learning_rate=1e-3), None),
)
trainer.train()
callback.export(f"{output}/adapter")
