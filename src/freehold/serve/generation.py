"""What Chat Completions and Completions have in common: how tokens are drawn, when an answer ends, what form it has.

OpenAI's fields and vLLM's, each honoured or refused. Whoever reads such a body turns it into `SamplingOptions` and an
`AnswerFormat` here, and asks `blame` which field an error is about that came later.
"""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from freehold import __version__
from freehold.errors import ContextError, FreeholdError, SchemaError, UsageError
from freehold.formats.forms import AnswerFormat, Choice, JsonObject, JsonSchema, Lark, Regex
from freehold.sampling import SamplingOptions
from freehold.serve.bodies import parse_json
from freehold.serve.errors import ApiError, api_error
from freehold.serve.sse import DONE, encode
from freehold.serve.wire import Hint, Refused, Wire
from freehold.session.generation import SampleDone

FINGERPRINT = f"freehold-{__version__}"
"""What answers name as the system that made them."""

MOST_SAMPLES = 128
_MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1000
"""Each token's text is held against each of the stop strings, on the thread that serves everybody."""
_MOST_BIASES = 1024
"""They are added up anew for each token."""
_LARGEST_BIAS = 100.0


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode())
    except UsageError as error:
        raise ValueError(f"a JSON schema given as text: {error}".replace("the body", "the text")) from None


Schema = Annotated[dict[str, Any], BeforeValidator(_parsed, json_schema_input_type=dict[str, Any] | str)]
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
_StopList = Annotated[list[_Stop], Field(max_length=_MOST_STOPS)]
_Stops = Annotated[_StopList, BeforeValidator(_listed, json_schema_input_type=_Stop | _StopList)]


class CompletionStreamOptions(Wire):
    include_usage: bool | None = Field(None, description="A last chunk without choices says how many tokens there were")
    include_obfuscation: Annotated[
        Any, Refused("chunks are not padded; use TLS where somebody may listen", unless=(None, False))
    ] = None
    continuous_usage_stats: Annotated[Any, Refused("usage comes once, at the end", unless=(None, False))] = None


class StructuredOutputs(Wire):
    """vLLM's: one of the forms."""

    # The name on the wire would hide a method of pydantic's.
    json_: Schema | None = Field(None, alias="json", description="A JSON schema, as an object or as text")
    regex: str | None = Field(None, description="A regular expression that all of the answer matches")
    choice: _Texts | None = Field(None, description="The answer is one of these texts")
    grammar: str | None = Field(None, description="A grammar in llguidance's variant of Lark, from its rule `start`")
    json_object: bool | None = Field(None, description="The answer is some JSON object")
    structural_tag: Annotated[Any, Refused("calls have Harmony's own structure; use tools")] = None
    disable_fallback: Annotated[bool | None, Hint("there is one implementation, and nothing to fall back on")] = None
    disable_any_whitespace: Annotated[
        Any, Refused("JSON is written with the spaces that models set", unless=(None, False))
    ] = None
    disable_additional_properties: Annotated[
        Any, Refused("say additionalProperties in the schema", unless=(None, False))
    ] = None
    whitespace_pattern: Annotated[Any, Refused("JSON is written with the spaces that models set")] = None


class Form(NamedTuple):
    """A form that was asked for, and the field that asked for it."""

    param: str
    form: AnswerFormat


class GenerationFields(Wire):
    """Fields of both; null is the same as leaving a field out."""

    model: str = Field(description="One of the names that /v1/models lists")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="vLLM's; 0 and -1 are all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="vLLM's")
    repetition_penalty: float | None = Field(
        None, gt=0, le=2, description="vLLM's; of all tokens seen, prompt included"
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(
        None, max_length=_MOST_BIASES, description="Token ids to what is added to their logits, ±100"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same tokens")
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES, description="How many answers; all count against the queue")
    stop: _Stops | None = Field(None, description="The text ends before the first of these")
    min_tokens: int | None = Field(
        None,
        ge=0,
        description="vLLM's; no stop token comes before so many tokens; a complete form ends the text",
    )
    ignore_eos: bool | None = Field(None, description="vLLM's; only max_tokens ends the text. Not with a form")
    stream: bool | None = Field(None, description="Server-sent events, ended by [DONE]")
    stream_options: CompletionStreamOptions | None = Field(None, description="Only with stream")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's; a form that is enforced")
    guided_json: Schema | None = Field(None, description="vLLM's older word for structured_outputs.json")
    guided_regex: str | None = Field(None, description="vLLM's older word for structured_outputs.regex")
    guided_choice: _Texts | None = Field(None, description="vLLM's older word for structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="vLLM's older word for structured_outputs.grammar")
    guided_decoding_backend: Annotated[Any, Refused("there is one, llguidance")] = None
    guided_whitespace_pattern: Annotated[Any, Refused("JSON is written with the spaces that models set")] = None

    user: Annotated[str | None, Hint("keys tell users apart; nothing is kept about this one")] = None
    service_tier: Annotated[
        Any, Refused("all requests are served alike", unless=(None, "auto", "default"))
    ] = None  # fmt: skip

    add_special_tokens: Annotated[
        Any, Refused("nothing is added to a prompt that it does not have", unless=(None, False))
    ] = None
    allowed_token_ids: Annotated[Any, Refused("use logit_bias or structured_outputs")] = None
    bad_words: Annotated[Any, Refused("use logit_bias", unless=(None, []))] = None
    cache_salt: Annotated[Any, Refused("cached prefixes are kept apart by key already")] = None
    include_stop_str_in_output: Annotated[Any, Refused("text ends before a stop string", unless=(None, False))] = None
    kv_transfer_params: Annotated[Any, Refused("one process runs the whole model")] = None
    length_penalty: Annotated[Any, Refused("there is no beam search", unless=(None, 1, 1.0))] = None
    logits_processors: Annotated[Any, Refused("no code of a client's is run", unless=(None, []))] = None
    priority: Annotated[Any, Refused("requests are served in the order in which they come", unless=(None, 0))] = None
    prompt_logprobs: Annotated[Any, Refused("use echo with logprobs of /v1/completions")] = None
    request_id: Annotated[Any, Refused("the server gives ids; send an x-request-id header")] = None
    return_token_ids: Annotated[Any, Refused("use /tokenize", unless=(None, False))] = None
    return_tokens_as_token_ids: Annotated[Any, Refused("tokens are given as text", unless=(None, False))] = None
    skip_special_tokens: Annotated[Any, Refused("control tokens are never text", unless=(None, True))] = None
    spaces_between_special_tokens: Annotated[
        Any, Refused("control tokens are never text", unless=(None, True, False))
    ] = None
    truncate_prompt_tokens: Annotated[Any, Refused("a prompt is taken whole or refused; shorten it")] = None
    use_beam_search: Annotated[Any, Refused("there is no beam search", unless=(None, False))] = None
    vllm_xargs: Annotated[Any, Refused("there are no plug-ins", unless=(None, {}))] = None

    @property
    def num_samples(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were. Raises a 400 for options of a stream without one."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise ApiError(400, "stream_options are for streams; set stream to true", param="stream_options")
        return bool(self.stream_options.include_usage)

    def sampling(self, *, logprobs: int | None, vocab_size: int) -> SamplingOptions:
        """Raises a 400 for a bias of tokens that the model does not have."""
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=None if self.logit_bias is None else _bias(self.logit_bias, vocab_size),
            seed=self.seed,
            logprobs=logprobs,
        )

    def form(self, *others: Form) -> Form | None:
        """The form of the answer, `others` being what further fields say. Raises a 400 where there is more than one."""
        forms = [*others, *self._guided()]
        if self.structured_outputs is not None:
            forms += _structured(self.structured_outputs)
        if len(forms) > 1:
            names = " and ".join(form.param for form in forms[:2])
            raise ApiError(400, f"{names} both ask for a form of the answer; give one", param=forms[1].param)
        return forms[0] if forms else None

    def _guided(self) -> list[Form]:
        forms: list[Form] = []
        if self.guided_json is not None:
            forms.append(Form("guided_json", JsonSchema(self.guided_json)))
        if self.guided_regex is not None:
            forms.append(Form("guided_regex", Regex(self.guided_regex)))
        if self.guided_choice is not None:
            forms.append(Form("guided_choice", Choice(tuple(self.guided_choice))))
        if self.guided_grammar is not None:
            forms.append(Form("guided_grammar", Lark(self.guided_grammar)))
        return forms


def _structured(given: StructuredOutputs) -> list[Form]:
    forms: list[Form] = []
    if given.json_ is not None:
        forms.append(Form("structured_outputs.json", JsonSchema(given.json_)))
    if given.regex is not None:
        forms.append(Form("structured_outputs.regex", Regex(given.regex)))
    if given.choice is not None:
        forms.append(Form("structured_outputs.choice", Choice(tuple(given.choice))))
    if given.grammar is not None:
        forms.append(Form("structured_outputs.grammar", Lark(given.grammar)))
    if given.json_object:
        forms.append(Form("structured_outputs.json_object", JsonObject()))
    return forms


def _bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    result = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise ApiError(
                400, f"logit_bias: {key!r:.40} is no token id of this model, which has 0 to {vocab_size - 1}",
                param="logit_bias",
            )  # fmt: skip
        if not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise ApiError(400, f"logit_bias: {bias!r} is not between -100 and 100", param="logit_bias")
        result[int(key)] = bias
    return result


# --- which field an error is about --------------------------------------------------------------------------

_OF_FORMS = ("the response format", "the regex", "the Lark grammar", "the choice")
_OF_PROMPTS = ("the prompt", "the text holds", "token id")
_OF_FUNCTION = re.compile(r"\bfunctions\.([\w.\-]+?)(?=[:\s,]|$)")


def blame(
    error: FreeholdError,
    *,
    fields: Collection[str],
    form: Form | None = None,
    tools: Mapping[str, str] | None = None,
    prompt: str,
) -> ApiError:
    """What a client is told of an error that came when its request was put together.

    `fields` are the body's names, `prompt` that of the one that holds the text; `tools` has where each function is
    described.
    """
    text = str(error)
    first = text.split(maxsplit=1)[0].rstrip(":,") if text.strip() else ""
    called = _OF_FUNCTION.search(text)
    param = None
    if isinstance(error, ContextError) or text.startswith(_OF_PROMPTS):
        param = prompt
    elif called and tools and called[1] in tools and first not in fields:
        param = tools[called[1]]
    elif form is not None and (isinstance(error, SchemaError) or text.startswith(_OF_FORMS)):
        param = form.param
    elif first in fields:
        param = first
    return api_error(error, param=param)


def fault(error: ApiError) -> bytes:
    """The end of a stream that failed on its way."""
    return encode(error.openai()) + DONE


# --- what was used ------------------------------------------------------------------------------------------


def usage(num_prompt_tokens: int, ends: list[SampleDone], *, num_cached_tokens: int) -> dict[str, Any]:
    """OpenAI's account of a request; a prompt counts once, however many samples it has."""
    generated = sum(end.num_tokens for end in ends)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": num_prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(end.num_reasoning_tokens for end in ends)},
    }
