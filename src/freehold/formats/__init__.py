"""Between text and token ids: tokenisers, conversations, and the chat formats that models speak.

Knows no tensors and no engine. `chat.choose` is the one door for callers above; the rest may be used
directly.
"""
