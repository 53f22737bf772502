"""Writes docs/reference.md: the public names with their signatures, from the docstrings. A test keeps it true."""

import inspect
from pathlib import Path

import illada
import illada.batch
import illada.commit_rules
import illada.continuous_batching
import illada.conversion
import illada.evaluation
import illada.generate_batch
import illada.rankings
import illada.step
import illada.text.blanks
import illada.text.trace

MODULES = (
    illada,
    illada.generate_batch,
    illada.continuous_batching,
    illada.commit_rules,
    illada.rankings,
    illada.step,
    illada.text.blanks,
    illada.text.trace,
    illada.conversion,
    illada.evaluation,
    illada.batch,
)
METHODS = {
    "MaskedDiffusionGenerationMixin": ("generate", "revise"),
    "ILLaDAForCausalLM": ("forward",),
    "ContinuousBatchingMixin": (
        "generate_batch",
        "init_continuous_batching",
        "continuous_batching_context_manager",
    ),
    "ContinuousBatchingManager": (
        "add_request",
        "add_requests",
        "call",
        "cancel_request",
        "get_result",
        "request_id_iter",
        "register_result_handler",
        "start",
        "stop",
        "is_running",
        "pause",
    ),
    "CommitRule": ("begin",),
}
HEAD = """# Reference

The public names, each with the first sentence of its docstring; `help(name)` shows the rest: shapes, dtypes, units,
errors. The models also have everything that a `PreTrainedModel` of Transformers has. This page is written by
`python docs/make_reference.py`.
"""


def names(module) -> list[str]:
    """What a module offers: `__all__`, or the functions and classes that it defines."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return sorted(getattr(module, "__all__", [name for name in defined if not name.startswith("_")]))


def summary(value) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def parameters(value) -> str:
    """Names and plain defaults of the parameters."""
    shown = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        has_default = parameter.default is not parameter.empty
        is_plain = isinstance(parameter.default, (str, int, float, bool, type(None)))
        shown.append(parameter.name + (f"={parameter.default!r}" if has_default and is_plain else ""))
    return ", ".join(shown)


def entry(title: str, value, indent: str = "") -> str:
    """One item of the page; values that are no functions have no signature, nor have classes that are settings."""
    is_function = inspect.isfunction(value)
    signature = f"({parameters(value)})" if is_function else ""
    kind = "Path" if isinstance(value, Path) else type(value).__name__
    text = summary(value) if is_function or inspect.isclass(value) else f"`{kind}`"
    return f"{indent}- **`{title}{signature}`** {text}".rstrip()


def render() -> str:
    """The page."""
    lines = [HEAD]
    for module in MODULES:
        lines += [f"## `{module.__name__}`", "", summary(module), ""]
        for name in names(module):
            value = getattr(module, name)
            lines.append(entry(name, value))
            lines += [entry(f".{method}", getattr(value, method), "  ") for method in METHODS.get(name, ())]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(render())
