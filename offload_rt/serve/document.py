"""The OpenAPI document: which routes there are, what they read, and what they answer with."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from offload_rt.serve.bodies import Json
from offload_rt.serve.guards import PUBLIC
from offload_rt.serve.wire import (
    MOST_STOP_CHARS,
    MOST_STOPS,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

_JSON, _TEXT = "application/json", "text/plain"
_ASKED: Mapping[str, tuple[str, type[Body]]] = {
    "/v1/chat/completions": ("Answer a conversation, whole or as a stream of events.", ChatBody),
    "/v1/completions": ("Go on with texts, or score them.", CompletionBody),
    "/tokenize": ("Token ids of a text or a conversation.", TokenizeBody),
    "/detokenize": ("The text of token ids.", DetokenizeBody),
}
_LOOKED_AT: Mapping[str, tuple[str, str]] = {
    "/v1/models": ("The model, by all its names.", _JSON),
    "/v1/models/{name}": ("The same by one of them.", _JSON),
    "/health": ("Whether it answers.", _JSON),
    "/metrics": ("Numbers for Prometheus.", _TEXT),
    "/props": ("What the page shows.", _JSON),
    "/tokenizer_info": ("The tokenizer and its chat template.", _JSON),
    "/openapi.json": ("This document.", _JSON),
    "/": ("A page to talk at.", "text/html"),
}
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_NARROWER: Mapping[str, Json] = {  # than a field's type: what is checked where it is read
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARS},
            _TEXTS | {"maxItems": MOST_STOPS},
            {"type": "null"},
        ]
    },
    "prompt": {"anyOf": [{"type": "string", "minLength": 1}, _TEXTS | {"maxItems": 4}, _IDS]},
    "content": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["type", "text"],
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                },
            },
            {"type": "null"},
        ]
    },
    "temperature": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]},
    "top_p": {"anyOf": [{"type": "number", "minimum": 0.01, "maximum": 1}, {"type": "null"}]},
    "min_p": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 0.99}, {"type": "null"}]},
    "presence_penalty": {"enum": [None, 0]},
    "frequency_penalty": {"enum": [None, 0]},
    "repetition_penalty": {"enum": [None, 1]},
    "logit_bias": {"enum": [None, {}]},
    "response_format": {"enum": [None, {"type": "text"}]},
    "tool_choice": {"enum": [None, "auto", "none"]},
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(version: str, names: Sequence[str]) -> Json:
    """All of it, as OpenAPI 3.1 has it."""
    bodies = [body for _, body in _ASKED.values()]
    template = "#/components/schemas/{model}"
    made, found = models_json_schema([(b, "validation") for b in bodies], ref_template=template)
    narrower = {**_NARROWER, "model": {"enum": [*names, None]}}
    for schema in found["$defs"].values():
        fields = schema["properties"]
        fields |= {name: narrower[name] for name in narrower.keys() & fields.keys()}
    paths: dict[str, Json] = {}
    for path, (about, kind) in _LOOKED_AT.items():
        paths[path] = {"get": _operation(path, about, {kind: {}})}
    paths["/v1/models/{name}"]["get"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {"enum": list(names)}}
    ]
    for path, (about, body) in _ASKED.items():
        answers: Json = {_JSON: {"schema": {"type": "object"}}}
        if path.startswith("/v1/"):
            answers["text/event-stream"] = {}
        sent = {"required": True, "content": {_JSON: {"schema": made[body, "validation"]}}}
        paths[path] = {"post": _operation(path, about, answers) | {"requestBody": sent}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "offload_rt", "version": version},
        "paths": paths,
        "components": {
            "schemas": found["$defs"] | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, about: str, answers: Json) -> dict[str, Any]:
    """A route: what it is for, and what comes back."""
    error = {"content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    if path == "/health":
        error = {"content": {_JSON: {"schema": {"type": "object"}}}}
    return {
        "summary": about,
        "responses": {
            "200": {"description": "What was asked for.", "content": answers},
            "4XX": {"description": "What was asked cannot be.", **error},
            "5XX": {"description": "It cannot be answered now.", **error},
        },
        **({} if path in PUBLIC else {"security": [{"key": []}]}),
    }
