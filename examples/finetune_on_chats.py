"""Instruction-tunes a model on a JSONL file of chats, in iLLaDA's format, and asks it a question.

python examples/finetune_on_chats.py chats.jsonl my-model "Sort the numbers: 3 1 2" [learning_rate=1e-4 ...]

The recipe beside this script starts from the embedded model, which knows nothing but its synthetic corpus
(docs/training.md): ask it what the chats teach. For real conversations, add model=GSAI-ML/iLLaDA-8B-Instruct.

A line is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from illada.training.recipe import train_recipe

if len(sys.argv) < 4:
    sys.exit(__doc__)
chats, output, question, *settings = sys.argv[1:]
recipe = Path(__file__).with_suffix(".yaml")
train_recipe(str(recipe), [f"train_data={chats}", f"output_dir={output}", *settings])

tokenizer = AutoTokenizer.from_pretrained(output)
model = AutoModelForCausalLM.from_pretrained(output)
prompt = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
