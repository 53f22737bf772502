"""The controls of the denoising on the page."""

import gradio as gr
import torch

from ..commit_rules import PARALLEL_RULES, rule_names
from ..generation_config import CANVASES, PRESETS
from ..rankings import RANKINGS

RULE_RANGES = {
    "confidence_threshold": (1.0, 0.9),
    "confidence_factor": (4.0, 1.0),
    "entropy_bound": (4.0, 0.5),
    "frechet_margin": (0.99, 0.25),
}
"""The largest value on the slider of each parallel rule, and the one that it begins with."""

AS_PRESET = "as the preset"


class Settings:
    """The controls of the denoising, and the arguments of `generate` that they stand for."""

    def __init__(self, model):
        own, positions = model.generation_config, model.config.max_position_embeddings
        block_length = own.block_length or 32
        self.device = model.device
        with gr.Row():
            self.preset = gr.Radio(list(PRESETS), value="exact", label="Preset (settings below override it)")
            self.max_new_tokens = gr.Slider(
                1,
                positions,
                own.max_new_tokens or 128,
                step=1,
                label="Maximum answer length (tokens)",
                elem_id="budget",
            )
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
            self.seed = gr.Number(0, precision=0, label="Random seed")
        with gr.Row():
            rules = [AS_PRESET, *PARALLEL_RULES, *rule_names()]
            self.rule = gr.Dropdown(rules, value=AS_PRESET, label="Parallel decoding rule")
            self.rule_value = gr.Slider(0, 1, 0.9, step=0.01, label="Value of the rule", elem_id="rule-value")
            self.steps = gr.Slider(0, 128, 0, step=1, label="Steps per block (0: as the preset)", elem_id="steps")
        with gr.Row():
            self.canvas = gr.Radio(list(CANVASES), value=own.canvas or model.default_canvas, label="Canvas")
            self.remasking = gr.Dropdown(
                list(RANKINGS), value=own.remasking or "low_confidence", label="Ranking of masked positions"
            )
            self.block_length = gr.Slider(
                1, max(128, block_length), block_length, step=1, label="Block length (tokens)"
            )
        self.rule.input(self._rule_slider, self.rule, self.rule_value)

    @staticmethod
    def _rule_slider(rule: str):
        maximum, value = RULE_RANGES.get(rule, (1.0, 0.9))
        return gr.Slider(maximum=maximum, value=value, interactive=rule in RULE_RANGES)

    @property
    def components(self) -> set:
        return {component for component in vars(self).values() if isinstance(component, gr.components.Component)}

    def arguments(self, values: dict) -> dict:
        """Those of every denoising, from the components' values."""
        temperature, rule, steps = values[self.temperature], values[self.rule], values[self.steps]
        arguments = {
            "preset": values[self.preset],
            "block_length": values[self.block_length],
            "remasking": values[self.remasking],
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            arguments["temperature"] = temperature
        if steps > 0:
            arguments["max_denoising_steps"] = steps
        if rule in PARALLEL_RULES:
            arguments[rule] = values[self.rule_value]
        elif rule != AS_PRESET:
            arguments["commit_rule"] = rule
        return arguments

    def generator(self, values: dict) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(int(values[self.seed] or 0))

    def answer_arguments(self, values: dict) -> dict:
        """Those of an answer, which has a canvas and a length."""
        answer = {"canvas": values[self.canvas], "max_new_tokens": values[self.max_new_tokens]}
        return self.arguments(values) | answer
