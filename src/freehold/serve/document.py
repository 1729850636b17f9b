"""The OpenAPI document: FastAPI's, with what is answered.

Endpoints answer with plain JSON, so what it looks like is written here: OpenAI's objects are the types of its SDK, the
others are spelled out. Made when it is asked for, since those types take a moment to be imported.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from freehold.serve.refusal import speaks_anthropic

_REF = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_NUMBER = {"type": "integer", "minimum": 0}
_NULLABLE = {"type": ["string", "null"]}


def _object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields]}


def _list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_NULLABLE, code=_NULLABLE))
_ANTHROPIC_ERROR = _object(
    type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT), request_id={"type": "string"}
)
_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT, max_model_len=_NUMBER)
_CONVERSATION = _object(id=_TEXT, object={"const": "conversation"}, created_at=_NUMBER, metadata={"type": "object"})
_ITEM = _object(type=_TEXT, id=_TEXT)
_ITEMS = _object(
    object={"const": "list"}, data=_list_of(_ITEM), first_id=_TEXT, last_id=_TEXT, has_more={"type": "boolean"}
)
_DELETED = {"deleted": {"const": True}}
_TIME = {"type": ["integer", "null"], "minimum": 0}
_FILE = _object(
    id=_TEXT,
    object={"const": "file"},
    bytes=_NUMBER,
    created_at=_NUMBER,
    expires_at=_TIME,
    filename=_TEXT,
    purpose={"enum": ["fine-tune", "fine-tune-results"]},
    status={"const": "processed"},
    status_details={"type": "null"},
)
_MESSAGE = _object(
    id=_TEXT,
    type={"const": "message"},
    role={"const": "assistant"},
    model=_TEXT,
    content=_list_of(_object(type={"enum": ["text", "thinking", "tool_use"]})),
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]},
    stop_sequence=_NULLABLE,
    usage={"type": "object"},
)


def _page_of(item: dict[str, Any]) -> dict[str, Any]:
    return _object(
        object={"const": "list"},
        data=_list_of(item),
        first_id=_NULLABLE,
        last_id=_NULLABLE,
        has_more={"type": "boolean"},
    )


def _of_sdk(model: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model)}


_JOBS = "/v1/fine_tuning/jobs"
_JOB = f"{_JOBS}/{{fine_tuning_job_id}}"
_ANSWERS: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/responses/input_tokens"): _object(object={"const": "response.input_tokens"}, input_tokens=_NUMBER),
    ("delete", "/v1/responses/{response_id}"): _object(id=_TEXT, object={"const": "response"}, deleted={"const": True}),
    ("get", "/v1/responses/{response_id}/input_items"): _ITEMS,
    ("post", "/v1/conversations"): _CONVERSATION,
    ("get", "/v1/conversations/{conversation_id}"): _CONVERSATION,
    ("post", "/v1/conversations/{conversation_id}"): _CONVERSATION,
    ("delete", "/v1/conversations/{conversation_id}"): _object(
        id=_TEXT, object={"const": "conversation.deleted"}, deleted={"const": True}
    ),
    ("post", "/v1/conversations/{conversation_id}/items"): _ITEMS,
    ("get", "/v1/conversations/{conversation_id}/items"): _ITEMS,
    ("get", "/v1/conversations/{conversation_id}/items/{item_id}"): _ITEM,
    ("delete", "/v1/conversations/{conversation_id}/items/{item_id}"): _CONVERSATION,
    ("post", "/v1/messages"): _MESSAGE,
    ("post", "/v1/messages/count_tokens"): _object(input_tokens=_NUMBER),
    ("get", "/v1/models"): _object(object={"const": "list"}, data=_list_of(_MODEL)),
    ("get", "/v1/models/{name}"): _MODEL,
    ("delete", "/v1/models/{name}"): _object(id=_TEXT, object={"const": "model"}, **_DELETED),
    ("post", "/v1/files"): _FILE,
    ("get", "/v1/files"): _page_of(_FILE),
    ("get", "/v1/files/{file_id}"): _FILE,
    ("delete", "/v1/files/{file_id}"): _object(id=_TEXT, object={"const": "file"}, **_DELETED),
    ("get", _JOBS): _page_of(_of_sdk("FineTuningJob")),
    ("get", f"{_JOB}/events"): _page_of(_of_sdk("FineTuningJobEvent")),
    ("get", f"{_JOB}/checkpoints"): _page_of(_of_sdk("FineTuningJobCheckpoint")),
    ("post", "/tokenize"): _object(
        count=_NUMBER,
        max_model_len=_NUMBER,
        tokens=_list_of(_NUMBER),
        token_strs={"anyOf": [_list_of(_TEXT), {"type": "null"}]},
    ),
    ("post", "/detokenize"): _object(prompt=_TEXT),
    ("get", "/health"): _object(status={"const": "ok"}),
    ("get", "/ready"): _object(status={"const": "ready"}),
}
_OF_THE_SDK = {
    ("post", "/v1/responses"): "Response",
    ("get", "/v1/responses/{response_id}"): "Response",
    ("post", "/v1/responses/{response_id}/cancel"): "Response",
    ("post", "/v1/chat/completions"): "ChatCompletion",
    ("post", "/v1/completions"): "Completion",
    ("post", _JOBS): "FineTuningJob",
    ("get", _JOB): "FineTuningJob",
    ("post", f"{_JOB}/cancel"): "FineTuningJob",
}
_STREAMS = (
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{response_id}"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/messages"),
)
_PLAIN = {("get", "/metrics"): "text/plain", ("get", "/v1/files/{file_id}/content"): "application/octet-stream"}


def document(app: FastAPI) -> dict[str, Any]:
    """Of all endpoints of this app; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = made.setdefault("components", {}).setdefault("schemas", {})
        components |= _sdk_types()
        components |= {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which nobody gets
            components.pop(name, None)
        for path, methods in made["paths"].items():
            for method, operation in methods.items():
                operation["responses"] = _responses(method, path)
        app.openapi_schema = made
    return app.openapi_schema


def _responses(method: str, path: str) -> dict[str, Any]:
    where = method, path
    if where in _PLAIN:
        content: dict[str, Any] = {_PLAIN[where]: {"schema": _TEXT}}
    elif where in _OF_THE_SDK:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=_OF_THE_SDK[where])}}}
    else:
        content = {"application/json": {"schema": _ANSWERS[where]}}
    if where in _STREAMS:
        content["text/event-stream"] = {"schema": _TEXT}
    error = "AnthropicError" if speaks_anthropic(path) else "Error"
    refused = {"application/json": {"schema": {"$ref": _REF.format(model=error)}}}
    failed = {"application/json": {"schema": {}}} if path == "/ready" else refused
    return {
        "200": {"description": "Done", "content": content},
        "4XX": {"description": "Refused: what is wrong, and where", "content": refused},
        "5XX": {"description": "It could not be done", "content": failed},
    }


def _sdk_types() -> dict[str, Any]:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
    from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
    from openai.types.responses import Response
    from pydantic.json_schema import models_json_schema

    answers = (
        Response,
        ChatCompletion,
        Completion,
        FineTuningJob,
        FineTuningJobEvent,
        FineTuningJobCheckpoint,
    )
    models = [(model, "serialization") for model in answers]
    _, schema = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    return dict(schema["$defs"])
