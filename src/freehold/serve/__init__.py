"""The HTTP server: OpenAI's Responses, Chat Completions and Completions, and Anthropic's Messages, over one model.

`app.create_app` makes the application out of a served model, a store and settings; `run.serve` listens.
"""
