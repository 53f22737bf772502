r"""Trains LoRA adapters of iLLaDA-8B on a JSONL file of chats, merges them and generates with the merged model.

python examples/lora_8b.py chats.jsonl my-adapter "What is 3 + 4?" [max_steps=500 ...]

On several GPUs, to train alone: accelerate launch -m illada.training examples/lora_8b.yaml \
    train_data=chats.jsonl output_dir=my-adapter
"""

import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada.training.recipe import train_recipe

if len(sys.argv) < 4:
    sys.exit(__doc__)
chats, output, question, *settings = sys.argv[1:]
recipe = Path(__file__).with_suffix(".yaml")
train_recipe(str(recipe), [f"train_data={chats}", f"output_dir={output}", *settings])

tokenizer = AutoTokenizer.from_pretrained(output)
base = AutoModelForCausalLM.from_pretrained("GSAI-ML/iLLaDA-8B-Instruct", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, output).merge_and_unload()
prompt = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
