"""Answers conform to a JSON schema, and other sequences of the batch are not affected."""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.sampling import SamplingParams, sample
from moondream_cv.errors import MoondreamError, RequestCancelled, SchemaError
from moondream_cv.requests import Detect, ErrorResult, Query, QueryResult, Request, Result, Settings

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

QUESTION = "What is this?"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "object": PERSON,
    "enum": {"enum": ["cat", "dog", 3, None, True, 'quote " and \\ and \u00e9']},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "integer": {"type": "integer", "minimum": -5, "maximum": 120},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "boolean": {"type": "boolean"},
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "string", "maxLength": 5}]},
    "nested": {
        "type": "object",
        "properties": {"people": {"type": "array", "items": PERSON, "maxItems": 2}, "type": {"const": "list"}},
        "required": ["people", "type"],
        "additionalProperties": False,
    },
    "$ref": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"enum": [1, 2]},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "oneOf with a discriminator": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "b"}, "on": {"type": "boolean"}},
                "required": ["kind", "on"],
                "additionalProperties": False,
            },
        ]
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "format": {"type": "string", "format": "date"},
}
SLOW = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{i}}}"} for i in range(20)]}


def ask(schema: Any, reasoning: bool = False, **changes: Any) -> Query:
    sampling: dict[str, Any] = {"temperature": 2.0, "top_p": 0.98, "max_tokens": 120, "seed": 0, **changes}
    return Query(None, QUESTION, reasoning, settings=Settings(**sampling), json_schema=schema)


def error_of(result: Result) -> Exception:
    assert isinstance(result, ErrorResult)
    return result.error


@pytest.fixture(scope="module", params=["tiny", "random"])
def either(request: pytest.FixtureRequest, model: LocalModel) -> LocalModel:
    return model if request.param == "random" else load("tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_complete_answers_conform_to_the_schema(either: LocalModel, name: str) -> None:
    schema = SCHEMAS[name]
    requests = [ask(schema, seed=seed) for seed in range(6)] + [ask(schema, temperature=0)]
    complete = 0
    for result in either.run(requests):
        assert isinstance(result, QueryResult)
        if not result.truncated:
            jsonschema.validate(json.loads(result.answer), schema)
            complete += 1
    assert complete >= (1 if name == "$ref" else 5)


def test_properties_keep_the_order_of_the_schema(model: LocalModel) -> None:
    schema = {"type": "object", "properties": {"b": {"const": 1}, "a": {"const": 2}}, "required": ["a", "b"]}
    (result,) = model.run([ask({**schema, "additionalProperties": False})])
    assert isinstance(result, QueryResult)
    assert result.answer == '{"b": 1, "a": 2}'


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from([*SCHEMAS, "text", "reasoning", "detect"]), min_size=2, max_size=6),
    seed=st.integers(0, 3),
    temperature=st.sampled_from((0.0, 2.0)),
)
def test_constrained_answers_do_not_depend_on_the_batch(
    model: LocalModel, frame: np.ndarray, names: list[str], seed: int, temperature: float
) -> None:
    free = Settings(temperature=temperature, max_tokens=30, seed=seed)
    others: dict[str, Request] = {
        "text": Query(frame, QUESTION, settings=free),
        "reasoning": ask(PERSON, True, seed=seed, temperature=temperature, max_tokens=40),
        "detect": Detect(frame, "dog", Settings(max_objects=3)),
    }
    requests = [others.get(n) or ask(SCHEMAS[n], seed=seed, temperature=temperature, max_tokens=40) for n in names]
    alone = [model.run([request])[0] for request in requests]
    for one, together in zip(alone, model.run(requests), strict=True):
        if isinstance(one, QueryResult):
            assert isinstance(together, QueryResult)
            assert (one.answer, one.truncated, one.reasoning) == (
                together.answer,
                together.truncated,
                together.reasoning,
            )
        else:
            assert one.to_dict().keys() == together.to_dict().keys()  # type: ignore[union-attr]


def test_reasoning_is_not_constrained(model: LocalModel) -> None:
    free, constrained = model.run([ask(None, True, max_tokens=40), ask(SCHEMAS["enum"], True, max_tokens=40)])
    assert isinstance(free, QueryResult)
    assert isinstance(constrained, QueryResult)
    assert free.reasoning == constrained.reasoning
    assert json.loads(constrained.answer) in SCHEMAS["enum"]["enum"]


def test_max_tokens_truncates_a_constrained_answer(model: LocalModel) -> None:
    whole, cut = model.run([ask(PERSON), ask(PERSON, max_tokens=4)])
    assert isinstance(whole, QueryResult)
    assert isinstance(cut, QueryResult)
    assert (whole.truncated, cut.truncated) == (False, True)
    assert whole.answer.startswith(cut.answer)


def test_streamed_constrained_answer_equals_the_answer(model: LocalModel) -> None:
    (whole,) = model.run([ask(PERSON)])
    assert isinstance(whole, QueryResult)
    assert "".join(model.stream(ask(PERSON))) == whole.answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "person"}, "Invalid type: person"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "greater than maximum"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"$ref": "https://example.com/schema"}, "not present in a registry"),
        ({"$ref": "#"}, "too complex"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}, "too complex"),
    ],
)
def test_an_unusable_schema_fails_only_its_request(model: LocalModel, schema: Any, message: str) -> None:
    failed, fine = model.run([ask(schema), ask(PERSON)])
    error = error_of(failed)
    assert isinstance(error, SchemaError)
    assert isinstance(error, ValueError)
    assert message in str(error)
    assert isinstance(fine, QueryResult)


def test_deep_references_do_not_crash_the_process(model: LocalModel) -> None:
    chain = {str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1000)}
    schema = {"$defs": {**chain, "1000": {"type": "null"}}, "$ref": "#/$defs/0"}
    (result,) = model.run([ask(schema, max_tokens=5)])
    assert isinstance(result, QueryResult) or isinstance(result.error, SchemaError)  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_schema_that_takes_long_to_compile_does_not_stall_other_requests(model: LocalModel) -> None:
    scheduler = model.scheduler()
    slow, fast = scheduler.submit(ask(SLOW)), scheduler.submit(Query(None, QUESTION, settings=Settings(max_tokens=5)))
    while not fast.done:
        scheduler.step()
    assert not slow.done
    while scheduler.step():
        pass
    assert slow.result is not None
    assert "too long to compile" in str(error_of(slow.result))


def test_a_request_can_be_cancelled_while_its_schema_compiles(model: LocalModel) -> None:
    scheduler = model.scheduler()
    job = scheduler.submit(ask({**SLOW, "title": "another"}))
    scheduler.step()
    assert scheduler.waiting == 1
    scheduler.cancel(job)
    assert not scheduler.step()
    assert job.result is not None
    assert isinstance(error_of(job.result), RequestCancelled)


def test_a_schema_without_llguidance_names_the_extra(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    failed, fine = model.run([ask(PERSON), ask(None, max_tokens=3)])
    error = error_of(failed)
    assert isinstance(error, MoondreamError)
    assert "moondream-cv[server]" in str(error)
    assert isinstance(fine, QueryResult)


def test_control_tokens_are_never_allowed(model: LocalModel) -> None:
    tokens = model.config.tokenizer
    packed = model.grammar_compiler.compile('{"type": "string"}').bitmask()
    allowed = np.flatnonzero(np.unpackbits(packed.view(np.uint8), bitorder="little"))
    assert not {tokens.eos_id, tokens.answer_id, tokens.coord_id, tokens.size_id} & set(allowed.tolist())
    assert allowed.max() < model.tokenizer.get_vocab_size()


@pytest.mark.parametrize("draw", [None, 0.5])
def test_bitmask_constrains_only_its_sequence(draw: float | None) -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    bitmask = np.zeros(3, np.int32)
    bitmask[2] = 1 << 4  # token 68
    free = sample(logits, [SamplingParams(1.0, 0.9, draw)] * 3)
    masked = sample(logits, [SamplingParams(1.0, 0.9, draw, bitmask=mask) for mask in (None, bitmask, None)])
    assert masked[0].tolist() == [free[0][0], 68, free[0][2]]
    assert masked[1].tolist() == [free[1][0], 0.0, free[1][2]]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([1], "must be a JSON object"),
        ("true", "must be a JSON object"),
        ("{", "must be valid JSON"),
        ({"a": object()}, "must be valid JSON"),
        ({"const": float("nan")}, "must be valid JSON"),
        ({"enum": ["x" * 65536]}, "at most 65,536 bytes"),
        (json.loads('{"items":' * 80 + "{}" + "}" * 80), "at most 64 levels"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "at most 64 levels"),
    ],
)
def test_invalid_schemas_are_rejected(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Query(None, QUESTION, json_schema=schema)


def test_a_request_with_a_schema_is_hashable_and_can_be_pickled() -> None:
    request = ask(PERSON)
    assert pickle.loads(pickle.dumps(request)) == request == ask(json.dumps(PERSON))
    assert hash(request) == hash(ask(PERSON))
