"""Trains LoRA adapters of the embedded model on a JSONL file of chats, reloads them and generates with them.

python examples/lora.py chats.jsonl my-adapter "Sort the numbers: 3 1 2" [max_steps=500 ...]
"""

import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import illada
from illada.training.recipe import train_recipe

if len(sys.argv) < 4:
    sys.exit(__doc__)
chats, output, question, *settings = sys.argv[1:]
recipe = Path(__file__).with_suffix(".yaml")
train_recipe(str(recipe), [f"train_data={chats}", f"output_dir={output}", *settings])

tokenizer = AutoTokenizer.from_pretrained(output)
base = AutoModelForCausalLM.from_pretrained(illada.EMBEDDED_MODEL)
model = PeftModel.from_pretrained(base, output)
prompt = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
