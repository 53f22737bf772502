"""The HTTP server of `illada serve`: OpenAI's interface over one model. Needs the extra `serve`.

`app.py` puts the application together. `writing.py`, `responding.py`, `infilling.py`, `revising.py` and `deciding.py`
have the endpoints, `requests.py` and `fields.py` what they accept, `answers.py` what they give back. `composing.py`
turns a request into texts to write, and `prompts.py` its prompts into token ids; each text is a `Choice`, which posts
what is settled. `worker.py` runs the model by the engine, in one thread: the rest of the server, which shares a
`Service`, hands it `TextRequest`s and listens.
"""
