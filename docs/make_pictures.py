"""Makes the pictures of the README from the embedded model: `python docs/make_pictures.py [denoising|demo ...]`.

`denoising.svg` plays two real denoisings; `demo.png` is the page of `illada demo` in a headless Chromium.
"""

import io
import sys
import tempfile
from html import escape
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL
from illada.demo.examples import with_blanks
from illada.demo.picture import confidence_colour, step_colour
from illada.text.blanks import encode_with_blanks
from illada.text.prompts import encode_prompt
from illada.text.trace import trace_tokens
from illada.tiny.corpus import held_out_examples

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

WIDTH, MARGIN, LINE = 860, 28, 50
CHARACTER = 10.2  # width in pixels; each text is set to it, whatever the reader's monospace font is
SECONDS_PER_PASS, SECONDS_AT_THE_END = 0.3, 3.0


def denoise(family: str, count: int = 40) -> tuple[str, list[dict], int]:
    """Title, tokens and forward passes of the longest denoising among held-out examples that the model gets right."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    best: tuple[str, list[dict], int] = ("", [], 0)
    for example in held_out_examples(family, count):
        if example.prompt:
            ids = encode_prompt(tokenizer, example.prompt)
            first_column, settings = len(ids), {}
        else:
            ids = encode_with_blanks(tokenizer, with_blanks(tokenizer, example), model.config.mask_token_id)
            first_column, settings = 1, {"max_new_tokens": 0}
        output = model.generate(torch.tensor([ids]), return_dict_in_generate=True, output_trace=True, **settings)
        tokens = trace_tokens(tokenizer, output, first_column)
        passes = int(output.num_forward_passes[0])
        text = tokenizer.decode(output.sequences[0, first_column:], skip_special_tokens=True)
        if example.is_correct(text) and passes > best[2]:
            best = (example.prompt or "Fill in the blanks", tokens, passes)
    if not best[2]:
        raise RuntimeError(f"The model solves none of {count} held-out examples of {family!r}.")
    return best


def keyframes(name: str, start: float, end: float, total: float) -> str:
    """Invisible until `start`, visible from then to `end`, in seconds of a loop of `total`."""
    first, shown, last = (round(100 * time / total, 2) for time in (start, start + 0.15, end))
    tail = "" if end >= total else f"{last}%,100%{{opacity:0}}"
    return f"@keyframes {name}{{0%,{first}%{{opacity:0}}{shown}%,{min(last, 100)}%{{opacity:1}}{tail}}}"


def lane(title: str, tokens: list[dict], passes: int, top: float) -> tuple[list[str], float]:
    """The elements of one denoising below `top`, and where they end."""
    parts = [f'<text x="{MARGIN}" y="{top}" class="title">{escape(title)}</text>']
    x, y = float(MARGIN), top + 40
    for token in tokens:
        text = token["text"].strip()
        width = CHARACTER * len(text)
        gap = 4 * bool(token["step"])  # around the colour
        x += CHARACTER * token["text"].startswith(" ") + gap
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN + float(gap), y + LINE
        label = f'<text x="{x:.1f}" y="{y}" textLength="{width:.1f}">{escape(text)}</text>'
        if token["step"]:
            box = f'x="{x - 2:.1f}" width="{width + 4:.1f}"'
            number = f'<text x="{x + width / 2:.1f}" y="{y + 23}" class="number">{token["step"]}</text>'
            parts.append(f'<rect {box} y="{y - 17}" height="23" rx="3" class="mask"/>')
            parts.append(
                f'<g class="s{token["step"]}"><rect {box} y="{y - 17}" height="23" rx="3" '
                f'fill="{confidence_colour(token["confidence"])}"/>'
                f'<rect {box} y="{y + 6}" height="4" fill="{step_colour(token["step"], passes)}"/>{label}{number}</g>'
            )
        else:
            parts.append(label)
        x += width + gap
    return parts, y + 64


def denoising_svg() -> str:
    """Both denoisings on one clock, as an SVG that animates itself with CSS and loops."""
    parts: list[str] = []
    top, longest = 76.0, 0
    parameters = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).num_parameters() / 1e6
    for family in ("word_problem", "grid"):
        title, tokens, passes = denoise(family)
        elements, top = lane(title, tokens, passes, top)
        parts += elements
        longest = max(longest, passes)
    total = (longest + 1) * SECONDS_PER_PASS + SECONDS_AT_THE_END
    times = [step * SECONDS_PER_PASS for step in range(longest + 2)]
    style = [keyframes(f"s{step}", times[step], total, total) for step in range(1, longest + 1)]
    for step in range(1, longest + 1):
        end = total if step == longest else times[step + 1]
        style += [keyframes(f"c{step}", times[step], end, total)]
        style += [f".s{step}{{animation:s{step} {total}s infinite}}.c{step}{{animation:c{step} {total}s infinite}}"]
        style += [f".c{step}{{opacity:{int(step == longest)}}}"]
        count = f"forward pass {step}"
        parts.append(f'<text x="{WIDTH - MARGIN}" y="40" class="count c{step}">{count}</text>')
    height = top + 14
    legend = "".join(
        f'<rect x="{MARGIN + 84 + 44 * i}" y="{height - 33}" width="40" height="18" rx="3" '
        f'fill="{confidence_colour(value)}"/>'
        f'<text x="{MARGIN + 104 + 44 * i}" y="{height - 20}" class="number swatch">{value:g}</text>'
        for i, value in enumerate((0.5, 0.8, 0.9, 0.95, 1.0))
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">
<title>Two texts are denoised: the surest tokens settle first, wherever they stand</title>
<style>
text{{font:17px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#1e1b2e;white-space:pre}}
.title,.head,.count,.legend{{font:15px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#475569}}
.head{{font-size:17px;font-weight:600;fill:#1e1b2e}}.count{{text-anchor:end;fill:#6d28d9;font-weight:600}}
.legend{{font-size:12px}}.end{{text-anchor:end}}.number{{font-size:10px;text-anchor:middle;fill:#64748b}}.swatch{{font-size:11px;fill:#1e1b2e}}
.mask{{fill:#e2e8f0}}
{"".join(style)}
@media (prefers-reduced-motion:reduce){{*{{animation:none!important}}}}
</style>
<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="14" fill="#fff" stroke="#e2e8f0"/>
<text x="{MARGIN}" y="40" class="head">{EMBEDDED_MODEL.name}, {parameters:.2f} million parameters</text>
{chr(10).join(parts)}
<text x="{MARGIN}" y="{height - 20}" class="legend">confidence</text>{legend}
<text x="{WIDTH - MARGIN}" y="{height - 20}" class="legend end">below: the forward pass that committed the token</text>
</svg>
"""


def demo_png() -> bytes:
    """The page, in the middle of an answer."""
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests"))
    from demo_page import DemoServer, Visitor

    question, _, passes = denoise("word_problem")
    with tempfile.TemporaryDirectory() as folder, DemoServer(Path(folder, "log")) as server:
        with Visitor(server.url, height=1040) as visitor:
            visitor.run(lambda: visitor.type("#message textarea", question, "\ue007"))  # Enter
            visitor.type("#forward-pass input[type=number]", str(passes * 2 // 3), "\ue004")  # Tab
            visitor.wait(lambda: len(visitor.driver.find_elements("css selector", "#canvas .mask")) > 2, "no masks")
            visitor.driver.execute_script("document.activeElement.blur()")
            png = visitor.driver.get_screenshot_as_png()
    picture = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(picture, "PNG", optimize=True)
    return picture.getvalue()


PICTURES = {"denoising": ("denoising.svg", lambda: denoising_svg().encode()), "demo": ("demo.png", demo_png)}

if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for chosen in sys.argv[1:] or PICTURES:
        name, make = PICTURES[chosen]
        (IMAGES / name).write_bytes(make())
        print(IMAGES / name)
