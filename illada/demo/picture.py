"""How a denoising looks: every token on the colour of its confidence, over the number of its forward pass."""

import html

CSS = """
.gradio-container { max-width: 1180px !important; margin: auto; }
.html-container { padding: 0 !important; }
.header h1 { font-size: 1.7rem; font-weight: 700; margin: 0; }
.header p { margin: .2rem 0 .4rem; line-height: 1.5; }
.conversation { height: 220px; overflow-y: auto; display: flex; flex-direction: column-reverse; border-radius: 10px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
.conversation > div { display: flex; flex-direction: column; gap: .5rem; padding: .8rem; }
.conversation > div:empty::before { content: "The conversation appears here."; color: var(--body-text-color-subdued); }
.message { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 85%; padding: .35rem .8rem; border-radius: 10px;
  border: 1px solid var(--border-color-primary); }
.message.user { align-self: flex-end; background: var(--color-accent-soft); }
.message.assistant { align-self: flex-start; }
@media (max-width: 860px) { .player { order: -1; } }  /* on a phone the denoising is seen while it happens */
.figures { display: flex; gap: .6rem; margin-bottom: .6rem; }
.figure { flex: 1; display: flex; flex-direction: column; padding: .4rem .9rem; border-radius: 10px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  color: var(--body-text-color-subdued); font-size: .8rem; }
.figure b { font-size: 1.5rem; color: var(--body-text-color); font-variant-numeric: tabular-nums; }
.canvas { min-height: 7.5rem; padding: .8rem 1rem; border-radius: 10px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
.canvas:empty::before { content: "The denoising is played here."; color: var(--body-text-color-subdued); }
.token { position: relative; display: inline-block; line-height: 1.5; white-space: pre; font-size: 1.05rem;
  height: 1.55em; vertical-align: top; border-radius: 4px; margin: 0 1px 22px; }
.token.committed { color: #1e1b2e; padding: 0 3px; border-bottom: 4px solid var(--step);
  border-radius: 4px 4px 0 0; height: calc(1.55em + 4px); margin-bottom: 18px; }
.token.committed::after { content: attr(data-step); position: absolute; top: 100%; left: 0; right: 0; margin-top: 6px;
  text-align: center; font-size: .62rem; line-height: 1.1; color: var(--body-text-color-subdued); }
.token.new { outline: 2px solid #6d28d9; outline-offset: 1px; }
.token.given[style] { color: #1e1b2e; }
.token.mask { min-width: 1.4em; padding: 0 3px; font-style: normal;
  color: var(--body-text-color-subdued); background: repeating-linear-gradient(135deg,
  var(--border-color-primary) 0 4px, transparent 4px 8px); border: 1px dashed var(--border-color-primary); }
.token del { color: #b91c1c; margin-right: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; align-items: center; margin-top: .5rem;
  font-size: .78rem; color: var(--body-text-color-subdued); }
.legend .swatch { padding: 1px 6px; color: #1e1b2e; }
.legend .bar { display: inline-block; width: 3rem; height: 5px; margin-right: 6px; vertical-align: middle;
  background: linear-gradient(90deg, hsl(262, 60%, 82%), hsl(262, 60%, 35%)); }
.legend .token { font-size: .78rem; margin: 0 4px 0 0; }
"""

LEGEND_CONFIDENCES = (0.5, 0.8, 0.9, 0.95, 1.0)


def confidence_colour(confidence: float) -> str:
    """From orange at 0 to blue-green at 1, for dark text; most of the scale lies above 0.8, where most tokens lie."""
    return f"hsl({20 + 150 * confidence**4:.0f}, 80%, 82%)"


def step_colour(step: int, num_steps: int) -> str:
    """From light violet for the first forward pass to dark violet for the last."""
    return f"hsl(262, 60%, {82 - 47 * step / max(num_steps, 1):.0f}%)"


def conversation_html(turns: list[tuple[str, str]]) -> str:
    """The messages: role and text of each. Text is shown as it is, whatever it looks like in HTML."""
    messages = "".join(f'<div class="message {role}">{html.escape(text)}</div>' for role, text in turns)
    return f'<div class="conversation" id="conversation" aria-live="polite"><div>{messages}</div></div>'


def denoising_html(tokens: list[dict], step: int, num_steps: int | None = None) -> str:
    """The text after forward pass `step` of `num_steps` (if that is known), with its figures and a legend.

    Args:
        tokens: as in `playing.py`; a token may also have `was`, the text that it replaces.
    """
    count = sum(bool(token["step"]) for token in tokens)
    figures = {
        "passes": ("forward passes", f"{step}"),
        "tokens": ("tokens", f"{count}"),
        "rate": ("tokens per forward", f"{count / step:.2f}" if step else "–"),
    }
    shown = "".join(
        f'<div class="figure"><b id="{name}">{value}</b>{label}</div>' for name, (label, value) in figures.items()
    )
    spans = "".join(_token_html(token, step, num_steps or step) for token in tokens)
    state = "running" if num_steps is None else "done"
    legend = "".join(
        f'<span class="swatch" style="background:{confidence_colour(value)}">{value:g}</span>'
        for value in LEGEND_CONFIDENCES
    )
    return (
        f'<div class="figures">{shown}</div>'
        f'<div class="canvas" id="canvas" data-state="{state}">{spans}</div>'
        f'<div class="legend"><span>confidence {legend}</span>'
        '<span><i class="bar"></i>number and colour below: forward pass, first to last</span>'
        '<span><i class="token mask">guess</i>still masked</span></div>'
    )


def _token_html(token: dict, step: int, num_steps: int) -> str:
    number, confidence = token["step"], token["confidence"]
    kind = "mask" if number is None else "given" if number == 0 else "committed"
    attributes = {"class": f"token {kind}"}
    if confidence is not None:
        attributes["title"] = f"confidence {confidence:.4f}"
        if kind != "mask":
            attributes["style"] = f"background: {confidence_colour(confidence)};"
    if kind == "committed":
        attributes["class"] += " new" if number == step else ""
        attributes["title"] = f"forward pass {number}, {attributes['title']}"
        attributes["style"] += f" --step: {step_colour(number, num_steps)}"
        attributes["data-step"] = str(number)
    written = "".join(f' {name}="{value}"' for name, value in attributes.items())
    was = f"<del>{html.escape(token['was'])}</del>" if token.get("was") else ""
    line_break = "<br>" if "\n" in token["text"] and kind != "mask" else ""
    return f"<span{written}>{was}{html.escape(token['text']).replace(chr(10), '↵')}</span>{line_break}"
