"""Pre-trains a small masked diffusion model on the documents of a JSONL file, lines of {"text": ...}.

python examples/pretrain_from_scratch.py documents.jsonl my-model [max_steps=2000 ...]
"""

import sys
from pathlib import Path

from illada.training.recipe import train_recipe

if len(sys.argv) < 3:
    sys.exit(__doc__)
documents, output, *settings = sys.argv[1:]
recipe = Path(__file__).with_suffix(".yaml")
trainer = train_recipe(str(recipe), [f"train_data={documents}", f"output_dir={output}", *settings])
print(f"{trainer.state.log_history[-1]['train_loss']:.3f} nats per token on average; the model is in {output}.")
