"""The HTTP server: OpenAI's API over the asynchronous engine, metrics, and a page to chat with the model.

`serve.py` starts it; `app.py` has the routes, `protocol.py` what requests and responses look like, `responses.py` makes
the responses out of what the engine yields, `tokens.py` writes tokens as text, `middleware.py` stands between HTTP and
the routes, `connection.py` is HTTP itself, `logs.py` what goes to stderr, `metrics.py` is what /metrics shows, and
`page.html` the page.
"""
