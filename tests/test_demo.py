"""The web page: the real server, driven in a headless Chromium, and what it is made of."""

import sys
import time

import pytest
import torch
from demo_page import DemoServer, Visitor, what_is_missing
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from illada import EMBEDDED_MODEL
from illada.commands.main import app
from illada.demo import examples
from illada.demo.picture import denoising_html
from illada.demo.playing import LiveTokens, hide_after, steps_and_output
from illada.text.blanks import encode_with_blanks
from illada.text.trace import trace_tokens
from illada.tiny.corpus import held_out_examples
from illada.tiny.tokenizer import train_tokenizer

ENTER, TAB = "\ue007", "\ue004"

needs_browser = pytest.mark.skipif(
    bool(what_is_missing()), reason=f"the page is not tried in a browser: this machine lacks {what_is_missing()}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with DemoServer(tmp_path_factory.mktemp("demo") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def visitor(server):
    with Visitor(server.url) as visitor:
        visitor.type("#pause input[type=number]", "0.05", TAB)
        yield visitor


def answer(model, tokenizer, question: str, **settings):
    """What a direct call of `generate` gives: text and output."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    settings = {"max_new_tokens": model.generation_config.max_new_tokens, **settings}
    output = model.generate(**ids, return_dict_in_generate=True, output_trace=True, **settings)
    return tokenizer.decode(output.sequences[0, ids.input_ids.shape[1] :], skip_special_tokens=True).strip(), output


def last_answer(visitor) -> str:
    return visitor.driver.find_elements("css selector", "#chatbot .bot .message-content, #chatbot .bot.message")[
        -1
    ].text


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
        assert committed == number <= passes
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
def test_stop_ends_the_playing(visitor):
    visitor.type("#pause input[type=number]", "1", TAB)
    visitor.driver.execute_script("document.querySelector('#canvas').dataset.state = 'before'")
    send(visitor, held_out_examples("ordering", 1)[0].prompt)()
    visitor.wait(lambda: visitor.find("#canvas").get_attribute("data-state") == "running", "the denoising begins not")
    visitor.click("#stop")
    visitor.type("#pause input[type=number]", "0.05", TAB)
    before = visitor.find("#passes").text
    time.sleep(2)
    assert visitor.find("#passes").text in (before, str(int(before) + 1))  # a step that was on its way may still come
    assert visitor.find("#canvas").get_attribute("data-state") == "running"


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
def test_what_cannot_be_done_is_said_in_one_sentence(visitor):
    def message_about(words: str) -> str:
        def found():
            toasts = visitor.driver.find_elements("css selector", ".toast-body")
            return next((toast.text for toast in toasts if words in toast.text), None)

        return visitor.wait(found, f"no message about {words!r}")

    visitor.click("button[role=tab]", "Chat")
    visitor.click("button.label-wrap", "More settings")
    visitor.type("#budget input[type=number]", "512", TAB)
    visitor.type("#message textarea", "Sort the numbers: 17 4 9", ENTER)
    assert "do not fit into the model's" in message_about("max_new_tokens")
    visitor.click("button[role=tab]", "Fill in")
    visitor.type("#blank-text textarea", "No blank here.")
    visitor.click("#fill")
    assert "such as <[MASK]>" in message_about("must hold a blank")
    assert visitor.value("#blank-text textarea") == "No blank here."  # nothing that was written is lost
    visitor.click("button[role=tab]", "Revise")
    visitor.type("#revise-threshold input[type=number]", "0", TAB)
    visitor.click("#revise")
    assert "must be a number in (0, 1]" in message_about("`threshold`")


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
    assert isinstance(result.exception, ValueError) and "pip install 'illada[demo]'" in str(result.exception)


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
