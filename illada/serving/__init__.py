"""The HTTP server of `illada serve`: OpenAI's interface over one model. Needs the extra `serve`.

`app.py` has the endpoints, `requests.py` what they accept and `answers.py` what they give back; `composing.py` turns a
request into texts to write, and `prompts.py` its prompts into token ids. `worker.py` runs the model by the engine, in
one thread: the rest of the server hands it `TextRequest`s and listens.
"""
