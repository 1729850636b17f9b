"""The Responses API: items in, a turn of the model, a Response object and its events out; kept for later turns."""
