"""Trains LoRA adapters of the embedded model on a JSONL file of chats, reloads them and generates with them.

python examples/lora.py chats.jsonl my-adapter "What is 3 + 4?" [max_steps=500 ...]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from illada.training.recipe import train_recipe

chats, output, question, *settings = sys.argv[1:]
recipe = Path(__file__).with_suffix(".yaml")
train_recipe(str(recipe), [f"train_data={chats}", f"output_dir={output}", *settings])

tokenizer = AutoTokenizer.from_pretrained(output)
model = AutoModelForCausalLM.from_pretrained(output)  # the base model, with the adapter of the folder
prompt = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
