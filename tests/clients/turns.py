"""What the scripted server says to clients: each turn is chosen by the last message of its prompt."""

from typing import Any

MANY = " ".join(str(number) for number in range(1, 401))
"""Long enough for a stream that is left half-way."""
ENDLESS = "and so on " * 30_000
"""Longer than any test waits for."""
PATCH = """*** Begin Patch
*** Update File: greet.py
@@
 def greet():
-    return "helo"
+    return "hello"
*** End Patch"""
_PATCH_CALL = (
    "<|channel|>analysis<|message|>Now the edit.<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.apply_patch code<|message|>{PATCH}<|call|>"
)


def _calling(name: str, **arguments: str) -> dict[str, Any]:
    return {"calls": [{"name": name, "arguments": arguments}]}


TURNS: tuple[dict[str, Any], ...] = (
    {"match": "^(Say hello|Hello$)", "reasoning": "A greeting.", "answer": "Hello there, friend."},
    {"match": "weather in Rome", "reasoning": "Look it up.", **_calling("get_weather", city="Rome")},
    {"match": "^24 degrees", "reasoning": "Warm, then.", "answer": "It is 24 degrees in Rome."},
    {"match": "^Describe a city", "reasoning": "Rome will do.", "answer": '{"city": "Rome", "people": 3}'},
    {"match": "^Count", "answer": MANY},
    {"match": "^Never end", "answer": ENDLESS},
    {"match": "^Fail", "answer": "So far", "fault": "the script ends badly here"},
    {"match": "^My name is Ada", "answer": "Hello, Ada."},
    {"match": "^Who am I", "answer": "You are Ada."},
    # A custom tool: its input is text, within a grammar.
    {"match": "^Add up", "completion": "<|channel|>commentary to=functions.calculate code<|message|>1+2<|call|>"},
    {"match": "^3$", "answer": "The sum is 3."},
    # Hand-overs of the Agents SDK.
    {"match": "founded", **_calling("transfer_to_historian")},
    {"match": "Historian", "answer": "Rome was founded in 753 BC."},
    # llm's own tool.
    {"match": "version of llm", **_calling("llm_version")},
    {"match": r"^\d+\.\d+", "answer": "That is the version."},
    # Codex: it looks, edits by its shell or by its tool, asks an agent that is not there, and says so.
    {"match": "typo in greet", "reasoning": "Look first.", **_calling("exec_command", cmd="cat greet.py")},
    {"match": "typo by tool", "completion": _PATCH_CALL},
    {
        "match": 'return "helo"',
        "reasoning": "Now the edit.",
        **_calling("exec_command", cmd=f"apply_patch <<'EOF'\n{PATCH}\nEOF"),
    },
    {"match": "Success. Updated", "reasoning": "Done.", "answer": "The typo is fixed."},
    {"match": "^Close the agent", "reasoning": "Whose?", **_calling("multi_agent_v1__close_agent", target="nobody")},
    {"match": "nobody", "answer": "There is no such agent."},
)
