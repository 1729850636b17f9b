"""`/tokenize` and `/detokenize`, in vLLM's shape: what a prompt is to the model, and back.

Both answer under /v1 as well, where OpenAI's clients look.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from freehold.errors import FreeholdError
from freehold.formats.tokenizer import Tokenizer
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import caller_of
from freehold.serve.chat_wire import read_conversation
from freehold.serve.effort import ReasoningEffort, thinking
from freehold.serve.errors import ApiError, api_error
from freehold.serve.server import Server
from freehold.serve.wire import Refused, Wire
from freehold.session.served import Served


class TokenizeRequest(Wire):
    """`POST /tokenize`: a text, or a conversation as /v1/chat/completions would give it to the model."""

    model: str | None = Field(
        None, description="One of the names that /v1/models lists; the model, where it is missing"
    )
    prompt: str | None = Field(None, description="Raw text. Control tokens' names in it stay text")
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, description="A conversation instead of a prompt")
    tools: list[dict[str, Any]] | None = Field(None, description="Only with messages")
    reasoning_effort: ReasoningEffort | None = Field(None, description="Only with messages")
    return_token_strs: bool | None = Field(None, description="token_strs are what each token stands for")
    add_special_tokens: Annotated[
        Any, Refused("nothing is added to a prompt that it does not have", unless=(None, False))
    ] = None
    add_generation_prompt: Annotated[
        Any, Refused("a conversation is what comes before a turn of the assistant", unless=(None, True))
    ] = None
    continue_final_message: Annotated[Any, Refused("an answer is begun anew", unless=(None, False))] = None
    chat_template: Annotated[Any, Refused("the model's own is used")] = None
    chat_template_kwargs: Annotated[Any, Refused("use reasoning_effort", unless=(None, {}))] = None
    mm_processor_kwargs: Annotated[Any, Refused("gpt-oss reads text only", unless=(None, {}))] = None


class DetokenizeRequest(Wire):
    """`POST /detokenize`."""

    model: str | None = Field(
        None, description="One of the names that /v1/models lists; the model, where it is missing"
    )
    tokens: list[int] = Field(description="Token ids. Control tokens come back by name")


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["Tokens"])

    @routes.post("/v1/tokenize", include_in_schema=False)
    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """The token ids of a text or of a conversation."""
        served = server.served
        if body.model is not None and body.messages is not None:
            served = await server.named(body.model, caller_of(request))
        elif body.model is not None:  # text is the same to all of its adapters, so none has to be read for it
            server.check_model(body.model, caller_of(request))
        ids = await asyncio.to_thread(_ids, served, body)
        tokenizer = server.served.prompting.the_tokenizer()
        return {
            "count": len(ids),
            "max_model_len": server.served.prompting.context,
            "tokens": ids,
            "token_strs": [tokenizer.decode((id_,), control="show") for id_ in ids] if body.return_token_strs else None,
        }

    @routes.post("/v1/detokenize", include_in_schema=False)
    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
        """The text of token ids."""
        if body.model is not None:
            server.check_model(body.model, caller_of(request))
        tokenizer: Tokenizer = server.served.prompting.the_tokenizer()
        for place, id_ in enumerate(body.tokens):
            if not tokenizer.is_token(id_):
                raise ApiError(400, f"{id_} is no token id of this model's vocabulary", param=f"tokens[{place}]")
        return {"prompt": tokenizer.decode(body.tokens, control="show")}

    return routes


def _ids(served: Served, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.messages is None:
        for name in ("tools", "reasoning_effort"):
            if getattr(body, name) is not None:
                raise ApiError(400, f"{name} are part of a conversation; give messages", param=name)
        try:
            served.prompting.check_length(body.prompt or "")
            return served.prompting.the_tokenizer().encode(body.prompt or "")
        except FreeholdError as error:
            raise api_error(error, param="prompt") from error
    effort = thinking(served, body.reasoning_effort, param="reasoning_effort")
    conversation = read_conversation(body.messages, body.tools)
    try:
        served.prompting.check_length(conversation)
        chat_format = served.prompting.chat_format(effort.effort, harmony=served.harmony)
        return list(chat_format.render(conversation).ids)
    except FreeholdError as error:
        raise api_error(error, param="messages") from error
