"""The server: what works with OpenAI's API, over HTTP."""
