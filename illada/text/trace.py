"""A denoising on record: a page that plays it, or a picture of the order in which positions were committed."""

import html
import json
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..generation import MaskedDiffusionGenerationOutput

FORMATS = (".html", ".png")


def check_trace_path(path: Path | None):
    """Raises a `ValueError` unless `path` is None or can be written: known format, its library, existing folder."""
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise ValueError(f"`path` must end with {' or '.join(FORMATS)}, got {str(path)!r}.")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"`path` must be a file in an existing folder, got {str(path)!r}.")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise ValueError("`path` needs matplotlib for a .png: `pip install matplotlib`, or name an .html file.")


def trace_tokens(
    tokenizer: PreTrainedTokenizerBase, output: MaskedDiffusionGenerationOutput, first_column: int = 0, row: int = 0
) -> list[dict]:
    """The row's tokens from `first_column` without padding: `text`, `step` (0 if given), `confidence` (or None)."""
    columns = zip(
        output.sequences[row].tolist(), output.commit_steps[row].tolist(), output.commit_confidences[row].tolist()
    )
    return [
        {"text": tokenizer.decode(token), "step": step, "confidence": round(confidence, 4) if step else None}
        for token, step, confidence in list(columns)[first_column:]
        if step or token != tokenizer.pad_token_id
    ]


def write_trace(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    output: MaskedDiffusionGenerationOutput,
    first_column: int = 0,
    row: int = 0,
):
    """Writes the denoising of one row to `path`, as its suffix says.

    Args:
        output: of `generate(..., return_dict_in_generate=True, output_trace=True)`.
        first_column: the first token to show; the length of the prompt to leave it out.

    Raises:
        ValueError: if `path` has another suffix than .html or .png, or its folder does not exist.
    """
    path = Path(path)
    check_trace_path(path)
    tokens = trace_tokens(tokenizer, output, first_column, row)
    if path.suffix == ".html":
        path.write_text(_page(tokens), encoding="utf-8")
    else:
        _picture(tokens, path)


def _picture(tokens: list[dict], path: Path):
    """Position against step, coloured by confidence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6, 0.32 * len(tokens)), 4.5), layout="constrained")
    written = [(position, token) for position, token in enumerate(tokens) if token["step"]]
    points = axes.scatter(
        [position for position, _ in written],
        [token["step"] for _, token in written],
        c=[token["confidence"] for _, token in written],
        vmin=0,
        vmax=1,
        cmap="viridis",
    )
    figure.colorbar(points, label="confidence when committed")
    labels = [token["text"].replace("\n", "\\n").replace("$", r"\$") for token in tokens]
    axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8)
    axes.set(ylabel="forward pass", title="Order in which tokens were committed")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _page(tokens: list[dict]) -> str:
    data = json.dumps(tokens, ensure_ascii=False).replace("</", "<\\/")
    text = html.escape("".join(token["text"] for token in tokens))
    return _PAGE.replace("@DATA@", data).replace("@TEXT@", text)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Denoising</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { font: 18px/1.7 system-ui, sans-serif; max-width: 48rem; margin: 3rem auto; padding: 0 1rem; color: #222; }
  #canvas { white-space: pre-wrap; min-height: 6rem; }
  #canvas span { border-radius: 3px; }
  .mask { background: #d9d9de; color: transparent; }
  .new { outline: 2px solid #222; }
  .controls { display: flex; gap: 1rem; align-items: center; margin: 1.5rem 0; font-size: 15px; }
  input { flex: 1; }
  .scale { height: .8rem; border-radius: 3px; background: linear-gradient(90deg, hsl(0 80% 85%), hsl(120 80% 85%)); }
  .legend { display: grid; grid-template-columns: auto 1fr auto; gap: .6rem; align-items: center; font-size: 13px; }
</style></head><body>
<h1>Denoising</h1>
<div id="canvas"><noscript>@TEXT@</noscript></div>
<div class="controls"><button id="play">Play</button><input id="step" type="range" min="0" value="0" aria-label="step">
<output id="count"></output></div>
<div class="legend"><span>confidence 0</span><div class="scale"></div><span>1</span></div>
<script>
const tokens = @DATA@;
const last = Math.max(0, ...tokens.map(t => t.step));
const canvas = document.getElementById("canvas"), slider = document.getElementById("step");
const count = document.getElementById("count"), play = document.getElementById("play");
const spans = tokens.map(token => {
  const span = document.createElement("span");
  span.textContent = token.text;
  span.title = token.step ? `forward pass ${token.step}, confidence ${token.confidence}` : "given";
  return canvas.appendChild(span);
});
slider.max = last;
function show(step) {
  slider.value = step;
  count.textContent = `forward pass ${step} of ${last}`;
  tokens.forEach((token, i) => {
    const masked = token.step > step;
    spans[i].className = masked ? "mask" : token.step && token.step === step ? "new" : "";
    spans[i].style.background = masked || !token.step ? "" : `hsl(${120 * token.confidence} 80% 85%)`;
  });
}
let timer = null;
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
play.onclick = () => {
  if (timer) return stop();
  let step = +slider.value >= last ? 0 : +slider.value;
  play.textContent = "Pause";
  timer = setInterval(() => { show(++step); if (step >= last) stop(); }, 250);
};
slider.oninput = () => { stop(); show(+slider.value); };
show(last);
</script></body></html>
"""
