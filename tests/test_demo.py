"""The web page: the real server, driven in a headless Chromium, and what it is made of."""

import os
import sys
import time

import pytest
import torch
from demo_page import DemoServer, Visitor, what_is_missing
from typer.testing import CliRunner

from illada import DenoisingStep
from illada.commands.main import app
from illada.demo import examples
from illada.demo.picture import denoising_html
from illada.demo.playing import LiveTokens, hide_after, steps_and_output
from illada.text.blanks import encode_with_blanks
from illada.text.trace import trace_tokens
from illada.tiny.corpus import held_out_examples
from illada.tiny.tokenizer import train_tokenizer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by Gradio on import
ENTER, TAB = "\ue007", "\ue004"

needs_browser = pytest.mark.skipif(
    bool(what_is_missing()), reason=f"the page is not tried in a browser: this machine lacks {what_is_missing()}"
)


@pytest.fixture(scope="module")
def tokenizer(embedded_tokenizer):
    return embedded_tokenizer


@pytest.fixture(scope="module")
def model(embedded_model):
    return embedded_model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with DemoServer(tmp_path_factory.mktemp("demo") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def visitor(server):
    with Visitor(server.url) as visitor:
        visitor.type("#pause input[type=number]", "0.05", TAB)
        visitor.click("button.label-wrap", "Settings")
        yield visitor


def answer(model, tokenizer, question: str, **settings):
    """What a direct call of `generate` gives: text and output."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    settings = {"max_new_tokens": model.generation_config.max_new_tokens, **settings}
    output = model.generate(**ids, return_dict_in_generate=True, output_trace=True, **settings)
    return tokenizer.decode(output.sequences[0, ids.input_ids.shape[1] :], skip_special_tokens=True).strip(), output


def messages(visitor, role: str = "") -> list[str]:
    """The texts that the conversation shows, as a visitor reads them."""
    found = visitor.driver.find_elements("css selector", f"#conversation .message{role and '.' + role}")
    return [element.get_property("textContent") for element in found]


def last_answer(visitor) -> str:
    return messages(visitor, "assistant")[-1]


def start(visitor, message: str):
    """Sends a message, and returns when its answer is being written."""
    visitor.driver.execute_script("document.querySelector('#canvas').dataset.state = 'before'")
    visitor.type("#message textarea", message, ENTER)
    visitor.wait(lambda: visitor.find("#canvas").get_attribute("data-state") == "running", "the denoising begins not")


def toast(visitor, words: str) -> str:
    """The message about these words, which is then put away."""

    def found():
        toasts = visitor.driver.find_elements("css selector", ".toast-body")
        return next((toast for toast in toasts if words in toast.text), None)

    shown = visitor.wait(found, f"no message about {words!r}")
    text = shown.text
    visitor.driver.execute_script("document.querySelectorAll('.toast-close').forEach(button => button.click())")
    return text


def send(visitor, message: str):
    return lambda: visitor.type("#message textarea", message, ENTER)


@needs_browser
def test_a_message_is_answered_before_the_visitor_s_eyes(visitor, model, tokenizer):
    question = held_out_examples("word_problem", 1)[0].prompt
    text, output = answer(model, tokenizer, question)
    states = visitor.run(send(visitor, question))

    passes = int(output.num_forward_passes[0])
    on_the_way = {(state["passes"], state["committed"]) for state in states if state["masked"]}
    assert len(on_the_way) >= 3  # every state is not caught, but several are: tokens settle one after another
    for number, committed in on_the_way:
        assert committed <= number <= passes  # what stands after the answer's end is not shown
    # The bubble shows text: neither special tokens nor what stands after the end.
    drafts = [state["answer"] for state in states if state["answer"]]
    assert len(set(drafts)) >= 3 and not any("<" in draft for draft in drafts)
    assert (states[-1]["passes"], states[-1]["masked"]) == (passes, 0)
    assert visitor.find("#rate").text == f"{float(output.tokens_per_forward[0]):.2f}"
    visitor.wait(lambda: last_answer(visitor) == text, f"the answer is not {text!r}")

    # the recorded denoising can be wound back: after three passes, three tokens had settled
    visitor.type("#forward-pass input[type=number]", "3", TAB)
    committed = "#canvas .committed"
    visitor.wait(lambda: len(visitor.driver.find_elements("css selector", committed)) == 3, "not wound back to 3")
    shown = [element.get_attribute("data-step") for element in visitor.driver.find_elements("css selector", committed)]
    assert sorted(shown) == ["1", "2", "3"]


@needs_browser
def test_a_slider_changes_the_number_of_forward_passes(visitor, model, tokenizer):
    question = held_out_examples("ordering", 1)[0].prompt
    figures = {}
    for steps in (0, 4):
        visitor.type("#steps input[type=number]", str(steps), TAB)
        visitor.run(send(visitor, question))
        text, output = answer(model, tokenizer, question, max_denoising_steps=steps or None)
        visitor.wait(lambda text=text: last_answer(visitor) == text, f"the answer is not {text!r}")
        figures[steps] = int(visitor.find("#passes").text)
        assert figures[steps] == int(output.num_forward_passes[0])
    visitor.type("#steps input[type=number]", "0", TAB)
    assert figures[4] < figures[0]


@needs_browser
def test_stop_ends_the_playing_and_keeps_the_turn(visitor, model, tokenizer):
    before, question = messages(visitor), held_out_examples("ordering", 1)[0].prompt
    visitor.type("#pause input[type=number]", "1", TAB)
    start(visitor, question)
    visitor.wait(lambda: int(visitor.find("#passes").text) >= 2, "there is no second pass")
    visitor.click("#stop")
    visitor.wait(lambda: visitor.find("#canvas").get_attribute("data-state") == "done", "it does not stop")
    visitor.type("#pause input[type=number]", "0.05", TAB)
    assert int(visitor.find("#passes").text) < int(answer(model, tokenizer, question)[1].num_forward_passes[0])
    *rest, asked, partial = messages(visitor)
    assert (rest, asked) == (before, question) and "░" in partial and partial.strip("░")
    visitor.run(send(visitor, question))
    text, _ = answer(model, tokenizer, question)
    visitor.wait(lambda: messages(visitor) == [*before, question, partial, question, text], "the turn is lost")


@needs_browser
def test_what_is_typed_during_an_answer_is_kept_and_what_is_sent_is_answered(visitor, model, tokenizer):
    before = messages(visitor)
    questions = [example.prompt for example in held_out_examples("word_problem", 2)]
    visitor.type("#pause input[type=number]", "0.3", TAB)
    start(visitor, questions[0])
    visitor.type("#message textarea", questions[1], ENTER)
    visitor.wait(lambda: visitor.value("#message textarea") == "", "the second message is not taken")
    assert visitor.find("#canvas").get_attribute("data-state") == "running"
    visitor.type("#message textarea", "half a mess")
    visitor.type("#pause input[type=number]", "0.05", TAB)
    answers = [answer(model, tokenizer, question)[0] for question in questions]
    expected = [*before, questions[0], answers[0], questions[1], answers[1]]
    visitor.wait(lambda: messages(visitor) == expected, f"the messages are not {expected}")
    assert visitor.value("#message textarea") == "half a mess"
    visitor.type("#message textarea", "")


@needs_browser
def test_text_is_text(visitor, model, tokenizer):
    """What looks like HTML or Markdown is shown as it was written, line breaks and spaces included."""
    message = "<b>bold</b> <s>a</s>  **b** <img src=x onerror=alert(1)> $$x$$ &lt;"
    visitor.run(send(visitor, message))
    expected, _ = answer(model, tokenizer, message)
    visitor.wait(lambda: messages(visitor)[-2:] == [message, expected], f"not {[message, expected]}")
    assert visitor.driver.find_elements("css selector", "#conversation .message *") == []


@needs_browser
def test_blanks_are_filled(visitor, model, tokenizer):
    visitor.click("button[role=tab]", "Fill in")
    example = max(held_out_examples("grid", 10), key=lambda example: len(example.blanks))
    text = examples.with_blanks(tokenizer, example)
    visitor.type("#blank-text textarea", text)
    states = visitor.run(lambda: visitor.click("#fill"))
    assert any(state["masked"] and state["committed"] for state in states)
    ids = torch.tensor([encode_with_blanks(tokenizer, text, model.config.mask_token_id)])
    filled = tokenizer.decode(model.generate(ids, max_new_tokens=0)[0], skip_special_tokens=True)
    visitor.wait(lambda: visitor.value("#filled-text textarea") == filled, f"the text is not {filled!r}")


@needs_browser
def test_a_selected_passage_becomes_a_blank(visitor, tokenizer):
    visitor.click("button[role=tab]", "Fill in")
    visitor.type("#blank-text textarea", "Today Tom has 3 pears and 4 cups.")
    visitor.driver.execute_script(
        """
        const field = arguments[0];
        field.focus(); field.setSelectionRange(14, 21); field.dispatchEvent(new Event("select", {bubbles: true}));
        """,
        visitor.find("#blank-text textarea"),
    )
    blank = f"<[MASK]*{len(tokenizer.tokenize(' 3 pears'))}>"

    def is_blanked():
        visitor.click("#blank-out")
        return blank in visitor.value("#blank-text textarea")

    visitor.wait(is_blanked, "the selection is not blanked out")
    assert visitor.value("#blank-text textarea") == f"Today Tom has{blank} and 4 cups."


@needs_browser
def test_an_edited_text_is_revised(visitor, model, tokenizer):
    visitor.click("button[role=tab]", "Revise")
    right = held_out_examples("sentence", 3)[-1].text
    edited = right.replace(" has ", " has 1", 1)  # a visitor slips in another digit
    visitor.type("#finished-text textarea", edited)
    visitor.run(lambda: visitor.click("#revise"))
    ids = tokenizer(edited, return_tensors="pt").input_ids
    output = model.revise(ids, threshold=0.02)
    assert output.changed.any()
    revised = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
    visitor.wait(lambda: visitor.value("#revised-text textarea") == revised, f"the text is not {revised!r}")
    struck = [element.text.strip() for element in visitor.driver.find_elements("css selector", "#canvas del")]
    assert struck == [tokenizer.decode(ids[0, i]).strip() for i in output.changed[0].nonzero().squeeze(-1)]


@needs_browser
def test_a_refused_input_changes_nothing_on_the_page(visitor, model, tokenizer):
    visitor.click("button[role=tab]", "Chat")
    question = "Sort the numbers: 17 4 9"
    visitor.run(send(visitor, question))
    visitor.wait(lambda: last_answer(visitor) == answer(model, tokenizer, question)[0], "there is no answer")

    def shown() -> tuple:
        return messages(visitor), visitor.find("#canvas").text, visitor.find("#passes").text

    before = shown()
    visitor.type("#message textarea", "   ", ENTER)
    assert "must hold some text" in toast(visitor, "The message")
    assert shown() == before and before[1]
    visitor.type("#budget input[type=number]", "512", TAB)
    visitor.type("#message textarea", question, ENTER)
    assert "do not fit into the model's" in toast(visitor, "max_new_tokens")
    assert shown() == before and visitor.value("#message textarea") == question
    visitor.type("#budget input[type=number]", "128", TAB)
    visitor.type("#message textarea", "")
    visitor.click("button[role=tab]", "Fill in")
    visitor.type("#blank-text textarea", "No blank here.")
    visitor.click("#fill")
    assert "No blank here." in toast(visitor, "a blank such as <[MASK]>")
    assert shown()[1:] == before[1:] and visitor.value("#blank-text textarea") == "No blank here."
    visitor.click("button[role=tab]", "Revise")
    visitor.type("#revise-threshold input[type=number]", "0", TAB)
    visitor.click("#revise")
    assert "must be a number in (0, 1]" in toast(visitor, "`threshold`")
    assert shown()[1:] == before[1:]
    visitor.click("button[role=tab]", "Chat")
    assert shown() == before


@needs_browser
def test_on_a_phone_the_denoising_is_above_what_is_typed(visitor):
    visitor.click("button[role=tab]", "Chat")
    visitor.driver.set_window_size(500, 844)
    try:
        visitor.wait(lambda: visitor.find("#canvas").rect["width"] < 500, "the page is not narrow")
        assert visitor.find("#canvas").rect["y"] < visitor.find("#message").rect["y"]
        assert visitor.find("#canvas").rect["y"] < 600
    finally:
        visitor.driver.set_window_size(*visitor.size)


@needs_browser
def test_nothing_reaches_beyond_this_machine(server, visitor):
    """Last, so that the page has been used: neither the page nor the server asked the network for anything."""
    outside = [url for url in visitor.requested_urls() if not url.startswith((server.url, "data:", "blob:"))]
    assert outside == []
    assert "REACHES FOR" not in server.log() and "Traceback" not in server.log()


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.delitem(sys.modules, "illada.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code != 0 and "pip install 'illada[demo]'" in str(result.exception)


@pytest.fixture(scope="module")
def page(model, tokenizer):
    pytest.importorskip("gradio", reason="needs the extra demo")
    from illada.demo.page import Page

    return Page(model, tokenizer, "illada-tiny", is_embedded=True)


def values_of(page, **changed) -> dict:
    """What Gradio hands the page's functions: the values of the components as they begin, but for `changed`."""
    from illada.demo.session import Session

    components = [page.remember, page.pause, page.threshold, page.rounds, *page.settings.components]
    values = {component: component.value for component in components}
    values |= {page.session: Session(), page.pause: 0, page.message: "", page.finished_text: "", page.blank_text: ""}
    return values | {getattr(page, name): value for name, value in changed.items()}


def test_a_function_that_refuses_leaves_every_component_as_it_is(page):
    """A generator that yields nothing, as 0.1 had them, makes Gradio empty all of its outputs."""
    import gradio as gr

    values = values_of(page, blank_text="No blank.", message=" ")
    for function in (page._fill, page._revise, page._answer):
        updates = list(function(values))
        assert updates and all(update == gr.skip() for each in updates for update in each.values()), function
    for message in (" ", "Tom has<[MASK]> pears.", "Tom has<[MASK]*2> pears.", "word " * 600):
        assert page._send(values | {page.message: message}) == {page.message: gr.skip()}
    assert not values[page.session].waiting


def test_one_thing_is_written_at_a_time(page):
    values = values_of(page, blank_text="Today Tom has 3 pears and<[MASK]> cups.", message="Sort the numbers: 17 4 9")
    session = values[page.session]
    filling = page._fill(values)
    next(filling), next(filling)
    assert list(page._send(values)) == [page.message] and not session.waiting  # it stays in its box
    assert len(list(page._revise(values_of(page, session=session, finished_text="Tom.")))) == 1
    filling.close()  # the visitor leaves
    page._send(values)
    assert list(session.waiting) == ["Sort the numbers: 17 4 9"]
    list(page._answer(values))
    assert [turn.content for turn in session.turns] == ["Sort the numbers: 17 4 9", "Sorted: 4 9 17"]


def test_the_conversation_that_the_model_is_told_of():
    from illada.demo.session import Session, Turn

    session = Session()
    session.turns = [Turn("user", "a"), Turn("assistant", "b", shown="b░c"), Turn("user", "lost", is_answered=False)]
    told = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert session.conversation("d", True) == [*told, {"role": "user", "content": "d"}]
    assert session.conversation("d", False) == [{"role": "user", "content": "d"}]
    assert session.shown_turns() == [("user", "a"), ("assistant", "b░c"), ("user", "lost")]


def test_a_checkpoint_says_whether_it_is_sent_the_conversation(page, model, tokenizer, monkeypatch):
    from illada.demo.page import Page

    assert (page.remember.value, page.remember.visible) == (False, False)
    monkeypatch.setattr(model.config, "single_turn", False, raising=False)
    other = Page(model, tokenizer, "another", is_embedded=False)
    assert (other.remember.value, other.remember.visible) == (True, True)


def test_a_fault_of_the_model_keeps_what_was_said(page, monkeypatch):
    import gradio as gr

    def fail(**arguments):
        raise RuntimeError("out of memory")

    values = values_of(page, message="Sort the numbers: 17 4 9")
    page._send(values)
    monkeypatch.setattr(page.model, "generate", fail)
    with pytest.raises(gr.Error, match="out of memory"):
        list(page._answer(values))
    session = values[page.session]
    assert session.shown_turns() == [("user", "Sort the numbers: 17 4 9")]
    assert session.begin("text")  # nothing is left that would be in the way


def test_live_tokens_show_nothing_after_the_end(tokenizer):
    live = LiveTokens(tokenizer, mask_token_id=5, first_column=1, eos_token_ids=[2])
    tokens = torch.tensor([[0, 40, 5, 2, 41, 5]])
    step = DenoisingStep(
        row=0,
        columns=torch.arange(1, 6),
        tokens=tokens[0],
        proposals=torch.tensor([40, 42, 2, 41, 43]),
        committed=torch.tensor([True, False, True, True, False]),
        confidence=torch.tensor([0.9, 0.5, 0.9, 0.9, 0.5]),
        num_forward_passes=1,
        remasked=torch.zeros(5, dtype=torch.bool),
    )
    assert [token["step"] for token in live(step)] == [1, None, 1]


def test_live_tokens_end_as_the_trace(tiny_model):
    tokenizer = train_tokenizer(num_examples=200)
    ids = torch.tensor([[0, 40, 5, 42]])
    live = LiveTokens(tokenizer, 5, first_column=1)
    frames = []
    output = tiny_model.generate(
        ids,
        max_new_tokens=6,
        block_length=3,
        eos_token_id=None,
        on_step=lambda step: frames.append(live(step)),
        return_dict_in_generate=True,
        output_trace=True,
    )
    final = trace_tokens(tokenizer, output, first_column=1)
    assert [(t["text"], t["step"]) for t in frames[-1]] == [(t["text"], t["step"]) for t in final]
    for number, frame in enumerate(frames, start=1):
        decided = [token for token in frame if token["step"] is not None]
        assert sorted(token["step"] for token in decided)[-number:] == list(range(1, number + 1))
        assert [t["step"] for t in hide_after(final, number)][: len(frame)] == [t["step"] for t in frame]
        # of what is undecided, the active block has guesses
        assert all(token["text"] or token["confidence"] is None for token in frame)


def test_an_abandoned_denoising_ends():
    made = []

    def denoise(on_step):
        for number in range(5000):
            made.append(number)
            on_step(number)
            time.sleep(0.001)

    steps = steps_and_output(denoise)
    assert [next(steps), next(steps)] == [0, 1]
    steps.close()  # as when a visitor leaves
    assert len(made) < 5000


def test_an_error_of_the_denoising_is_raised(tiny_model):
    with pytest.raises(ValueError, match="`block_length`"):
        list(steps_and_output(tiny_model.generate, inputs=torch.tensor([[0, 40]]), block_length=0))


def test_text_cannot_break_out_of_the_picture():
    tokens = [
        {"text": "<script>", "step": 1, "confidence": 0.5, "was": "<b>"},
        {"text": '"><i>', "step": None, "confidence": None},
    ]
    page = denoising_html(tokens, 1)
    assert "<script>" not in page and "<b>" not in page.replace('<b id="', "") and '"><i>' not in page


def test_examples_are_of_the_corpus_and_held_out(tokenizer):
    assert len(examples.prompts()) >= 4
    texts = examples.texts_with_blanks(tokenizer)
    assert texts and all(encode_with_blanks(tokenizer, text, 5).count(5) >= 1 for text in texts)
    assert examples.spoiled_texts()
    assert "%" in examples.measured_accuracy() and "## " not in examples.measured_accuracy()


def test_every_rule_of_the_page_is_one_of_generate(model):
    gr = pytest.importorskip("gradio", reason="needs gradio")
    from illada.commit_rules import COMMIT_RULES
    from illada.demo.settings import Settings
    from illada.generation_config import MaskedDiffusionGenerationConfig

    with gr.Blocks():
        settings = Settings(model)
        names = [name for name, _ in settings.rule.choices]
        assert set(COMMIT_RULES) < set(names)
        for name in names:
            slider = settings._rule_slider(name)
            values = {component: component.value for component in settings.components}
            arguments = settings.arguments(values | {settings.rule: name, settings.rule_value: slider.value})
            config = MaskedDiffusionGenerationConfig.merged(None, None, **arguments)
            assert name not in COMMIT_RULES or name in (config.commit_rule, *arguments)
