"""Jinja templates: the same ids as transformers, and no way from user text to a control token."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import CheckpointError, FreeholdError, UnsupportedError, UsageError
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    Text,
    Tool,
    text_message,
)
from freehold.formats.templates import CHATML, ChatTemplate
from freehold.formats.tokenizer import Tokenizer

SMOLLM2 = """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_3 = """{% set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

BLOCKS = """{%- set ns = namespace(n=0) -%}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
    {% generation %}
<|im_start|>{{ message.role | upper }} {{ ns.n }}: {{ message | tojson }}<|im_end|>
    {% endgeneration %}
{% endfor %}
{% if tools is none and not documents %}{{ strftime_now('%Y')[:2] }}{% endif %}"""

PHI = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"

# A template that does its best to put user text next to pieces of its own control tokens.
CARELESS = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|><{{ m.content | trim }}>"
    "<|im_end|{{ m.content }}|im_end|>{{ m.content[:5] }}|>{{ m.content.split('x') | join }}"
    "{{ m.content | lower | replace(' ', '') }}{{ m.content | reverse }}{{ m.content[::-1] }}{{ m | tojson }}"
    "{{ m.content | list | join }}{% endfor %}"
)

TEMPLATES = {"chatml": CHATML, "smollm2": SMOLLM2, "llama-3": LLAMA_3, "blocks": BLOCKS, "phi": PHI}


@pytest.fixture(scope="module")
def tokenizer(small: Tokenizer) -> Tokenizer:
    more = [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|user|>",
        "<|end|>",
    ]
    return small.with_control_tokens([*more, "secret"])


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = Path(tmp_path_factory.mktemp("theirs"), "tokenizer.json")
    tokenizer.save(path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<|begin_of_text|>")


def talk(*contents: str, system: str | None = None) -> Conversation:
    roles: list[Role] = ["user", "assistant"]
    messages = [text_message(roles[i % 2], content) for i, content in enumerate(contents)]
    return Conversation(messages=(*([text_message("system", system)] if system is not None else []), *messages))


# --- as transformers does
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize(
    "conversation",
    [
        talk("hello"),
        talk("  hello 12 \n", "hell\n\nhe é😀", 'say "{{ 1 }}" & <b>'),
        talk("hello", system="be <brief>"),
    ],
)
def test_benign_chats_have_the_ids_that_transformers_gives(
    tokenizer: Tokenizer, theirs: Any, name: str, prompted: bool, conversation: Conversation
) -> None:
    messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
    variables = {"bos_token": "<|begin_of_text|>"}
    ids = ChatTemplate(TEMPLATES[name], variables=variables).render(
        conversation, tokenizer, add_generation_prompt=prompted
    )
    expected = theirs.apply_chat_template(
        messages,
        chat_template=TEMPLATES[name],
        tokenize=True,
        add_generation_prompt=prompted,
        return_dict=False,
    )
    assert ids == expected


def test_smollm2_gets_its_default_system_prompt(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(ChatTemplate(SMOLLM2).render(talk("hello"), tokenizer), control="show")
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_developer_messages_are_system_prompts_here(tokenizer: Tokenizer) -> None:
    part = DeveloperContent(instructions="Be brief.")
    developer = Conversation(messages=(Message(role="developer", parts=(part,)),))
    template = ChatTemplate(CHATML)
    assert template.render(developer, tokenizer) == template.render(talk(system="Be brief."), tokenizer)


# --- injection
# --------------------------------------------------------------------------------------------------


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [name for id_ in ids if (name := tokenizer.control_name(id_))]


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "<|im_end|>",
                "<|im_end|",
                "<|im_",
                "im_end|>",
                "|im_end|>",
                "<",
                ">",
                "|>",
                "<|",
                " ",
                "\n",
                "secret",
            ]
        ),
        st.sampled_from(
            [
                "<|IM_END|>",
                ">|dne_mi|<",
                "sec",
                "ret",
                "SECRET",
                "\ue000",
                "\ue001",
                "x",
                "<<|im_end|>|im_end|>",
            ]
        ),
        st.text(max_size=3),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(content=HOSTILE)
def test_a_template_gives_as_many_control_tokens_as_it_wrote(tokenizer: Tokenizer, content: str) -> None:
    benign = ChatTemplate(CARELESS).render(talk("hello"), tokenizer)
    ids = ChatTemplate(CARELESS).render(talk(content), tokenizer)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, benign)


@settings(max_examples=200, deadline=None)
@given(content=HOSTILE, system=HOSTILE)
def test_hostile_text_arrives_unchanged(tokenizer: Tokenizer, content: str, system: str) -> None:
    ids = ChatTemplate(CHATML).render(talk(content, system=system), tokenizer)
    start, end = tokenizer.control_id("<|im_start|>"), tokenizer.control_id("<|im_end|>")
    expected: list[int] = []
    for role, text in (("system", system), ("user", content)):
        expected += [start, *tokenizer.encode(f"{role}\n{text}"), end, *tokenizer.encode("\n")]
    assert ids == [*expected, start, *tokenizer.encode("assistant\n")]


def test_plain_words_that_are_control_tokens_stay_words(tokenizer: Tokenizer) -> None:
    ids = ChatTemplate("{{ messages[0].content }}secret").render(talk("secretsecret"), tokenizer)
    assert ids == [*tokenizer.encode("secretsecret"), tokenizer.control_id("secret")]


# --- errors
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said", "source"),
    [
        (CheckpointError, "cannot be read", "{% for %}"),
        (CheckpointError, "cannot be read", "{{ messages | nosuchfilter }}"),
        (
            UsageError,
            "refuses this conversation: roles must alternate",
            "{{ raise_exception('roles must alternate') }}",
        ),
        (CheckpointError, "UndefinedError", "{{ nosuch.field }}"),
        (CheckpointError, "TypeError", "{{ messages[0] + 1 }}"),
        (CheckpointError, "ZeroDivisionError", "{{ 1 // (messages | length - 1) }}"),
        (CheckpointError, "OverflowError", "{% for i in range(10 ** 9) %}{% endfor %}"),
        (CheckpointError, "RecursionError", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
        (CheckpointError, "SecurityError", "{{ messages.append(1) }}"),
        (CheckpointError, "SecurityError", "{{ ''.__class__.__mro__ }}"),
        (CheckpointError, "SecurityError", "{{ ''.__class__.__base__.__subclasses__() }}"),
        (CheckpointError, "TemplateNotFound|no loader", "{% include '/etc/passwd' %}"),
    ],
)
def test_bad_templates_end_in_a_typed_error(
    tokenizer: Tokenizer, kind: type[Exception], said: str, source: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        ChatTemplate(source).render(talk("hello"), tokenizer)
    assert isinstance(caught.value, FreeholdError)


@pytest.mark.parametrize(
    ("source", "said", "message"),
    [
        (CHATML, "does not speak of tool calls", Message(role="tool", name="f", parts=(Text(text="x"),))),
        (CHATML, "does not speak of tool calls", Message(role="assistant", recipient="functions.f", parts=())),
        (
            CHATML,
            "does not speak of tools",
            Message(role="developer", parts=(DeveloperContent(tools=(Tool(name="f"),)),)),
        ),
        (CHATML, "text and tools only", Message(role="system", parts=(SystemContent(),))),
        (
            CHATML,
            "text and tools only",
            Message(
                role="developer",
                parts=(DeveloperContent(response_formats=(ResponseFormat(name="f", schema={}),)),),
            ),
        ),
        (
            "{{ tool_calls }}",
            "calls of functions only, not of 'python'",
            Message(role="assistant", recipient="python", parts=()),
        ),
    ],
)
def test_what_templates_cannot_say_is_refused(tokenizer: Tokenizer, source: str, said: str, message: Message) -> None:
    with pytest.raises(UnsupportedError, match=said):
        ChatTemplate(source).render(Conversation(messages=(message,)), tokenizer)


def test_tools_that_are_nested_too_deeply_are_refused(tokenizer: Tokenizer) -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    message = Message(role="developer", parts=(DeveloperContent(tools=(Tool(name="f", parameters=deep),)),))
    with pytest.raises(UsageError, match="nested too deeply"):
        ChatTemplate("{{ tools }}").render(Conversation(messages=(message,)), tokenizer)


# --- tools
# ------------------------------------------------------------------------------------------------------

HERMES = """{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}\
{{ '<|im_end|>\n' }}{% endif %}\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}\
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

WEATHER = Tool(
    name="weather", description="How is it?", parameters={"type": "object", "properties": {"city": {"type": "string"}}}
)


def calling(arguments: str, recipient: str = "functions.weather") -> Message:
    return Message(role="assistant", parts=(Text(text=arguments),), channel="commentary", recipient=recipient)


def answered(text: str) -> Message:
    return Message(role="tool", name="functions.weather", parts=(Text(text=text),), recipient="assistant")


def test_tools_and_calls_have_the_ids_that_transformers_gives(tokenizer: Tokenizer, theirs: Any) -> None:
    conversation = Conversation(
        messages=(
            Message(
                role="developer", parts=(DeveloperContent(instructions="Be brief.", tools=(WEATHER, Tool(name="f"))),)
            ),
            text_message("user", "Rome?"),
            text_message("assistant", "Wait.", channel="commentary"),
            calling('{"city": "Rome", "days": [1, null]}'),
            calling("no json", "functions.f"),
            answered("sunny"),
            calling("{}"),
        )
    )
    functions = [
        {"name": "weather", "description": "How is it?", "parameters": WEATHER.parameters},
        {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
    ]
    calls = [
        {"name": "weather", "arguments": {"city": "Rome", "days": [1, None]}},
        {"name": "f", "arguments": "no json"},
        {"name": "weather", "arguments": {}},
    ]
    expected = theirs.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": call} for call in calls[:2]]},
            {"role": "tool", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": calls[2]}]},
        ],
        tools=[{"type": "function", "function": function} for function in functions],
        chat_template=HERMES,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ChatTemplate(HERMES).render(conversation, tokenizer) == expected


def test_a_message_that_only_offers_tools_is_none_to_a_template(tokenizer: Tokenizer) -> None:
    tools = Message(role="developer", parts=(DeveloperContent(tools=(WEATHER,)),))
    text = tokenizer.decode(ChatTemplate(HERMES).render(Conversation(messages=(tools,)), tokenizer), control="show")
    assert text.count("<|im_start|>") == 2


@settings(max_examples=200, deadline=None)
@given(text=HOSTILE)
def test_no_text_of_tools_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    def ids(text: str) -> list[int]:
        schema = {"type": "object", "properties": {text: {"description": text, "enum": [text, 1]}}, "required": [text]}
        tool = Tool(name="f", description=text, parameters=schema)
        developer = Message(role="developer", parts=(DeveloperContent(instructions=text, tools=(tool,)),))
        calls = (calling(json.dumps({text: [text]})), calling(text), answered(text))
        return ChatTemplate(HERMES).render(Conversation(messages=(developer, *calls)), tokenizer)

    assert control_ids(tokenizer, ids(text)) == control_ids(tokenizer, ids("hello"))


def test_tojson_does_not_escape_html(tokenizer: Tokenizer) -> None:
    ids = ChatTemplate("{{ messages[0] | tojson }}").render(talk("<é & '>"), tokenizer)
    assert json.loads(tokenizer.decode(ids)) == {"role": "user", "content": "<é & '>"}
    assert tokenizer.decode(ids) == '{"role": "user", "content": "<é & \'>"}'
