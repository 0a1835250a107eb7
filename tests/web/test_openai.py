"""The gateway as programs use it: OpenAI's own package and curl, over a mesh of real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from support.reference import llama_scores

from shardmesh.demo_model import DEMO_MODEL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here"),
]

PROMPT = "Once upon a time there was a king who"
LONG_PROMPT = (
    "Once upon a time there was a king who had three daughters. The youngest was so beautiful that "
    "the sun itself, which has seen so much, was astonished whenever it shone in her face."
)
MODEL = "Shardmesh fairy tales"
TIMEOUT_S = 60.0
N_EXAMPLES = 3  # of each route; the same each time


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_a_completion_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    pieces = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"


def test_several_prompts_choices_and_echo(client: openai.OpenAI) -> None:
    several = client.completions.create(
        model=MODEL, prompt=[PROMPT, "The queen"], max_tokens=3, n=2, seed=5, echo=True
    )
    texts = [choice.text for choice in several.choices]
    assert [text.startswith(PROMPT) for text in texts] == [True, True, False, False]
    again = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, seed=5, echo=True)
    assert again.choices[0].text == texts[0], "the seed decides"


def test_tokens_as_prompt(client: openai.OpenAI, url: str) -> None:
    tokens = httpx.post(
        f"{url}/tokenize", json={"content": PROMPT, "add_special": True}, timeout=TIMEOUT_S
    ).json()["tokens"]
    of_text, of_tokens = (
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
        for prompt in (PROMPT, tokens)
    )
    assert of_text.choices[0].text == of_tokens.choices[0].text
    back = httpx.post(f"{url}/detokenize", json={"tokens": tokens}, timeout=TIMEOUT_S).json()
    assert PROMPT in back["content"]


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    stop = whole.choices[0].text.split()[3]
    cut = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == whole.choices[0].text.partition(stop)[0]


def test_logprobs_and_logit_bias(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPT}],
        max_completion_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content
    assert entries is not None
    assert [entry.token for entry in entries] == [entry.top_logprobs[0].token for entry in entries]
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in entries)
    assert bytes(entries[0].bytes or []).decode() == entries[0].token
    old = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=2, temperature=0, logprobs=2
    )
    assert old.choices[0].logprobs is not None
    assert len(old.choices[0].logprobs.tokens or []) == 2
    biased = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={"300": 100}
    )
    same = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={"300": 100}
    )
    assert biased.choices[0].text == same.choices[0].text != old.choices[0].text


def test_how_likely_a_prompt_is(client: openai.OpenAI, url: str) -> None:
    """What evaluation harnesses ask for, against llama.cpp in one process."""
    asked = httpx.post(
        f"{url}/tokenize", json={"content": LONG_PROMPT, "add_special": True}, timeout=TIMEOUT_S
    ).json()["tokens"]
    expected = llama_scores(DEMO_MODEL, asked)
    for prompt in (LONG_PROMPT, asked):
        scored = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1
        )
        (choice,) = scored.choices
        assert choice.logprobs is not None
        found, best = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        offsets = choice.logprobs.text_offset
        assert found is not None
        assert best is not None
        assert offsets is not None
        assert len(found) == len(best) == len(offsets) == len(asked) + 1
        assert (found[0], best[0]) == (None, None)
        assert found[1:-1] == pytest.approx(expected, abs=1e-3)
        assert LONG_PROMPT in choice.text
        assert offsets == sorted(offsets)
        likeliest = [None if top is None else max(top.values()) for top in best]
        is_greedy = [own == most for own, most in zip(found, likeliest, strict=True)]
        assert is_greedy[-1]
        assert not all(is_greedy)


def test_a_prompt_alone_and_streamed(client: openai.OpenAI) -> None:
    alone = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
    )
    assert alone.choices[0].text == PROMPT
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0
    pieces = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=2, echo=True, logprobs=0, seed=1, stream=True
        )
    )
    lists = [p.choices[0].logprobs for p in pieces if p.choices and p.choices[0].logprobs]
    n_scored = sum(len(each.token_logprobs or []) for each in lists)
    assert alone.choices[0].logprobs is not None
    assert n_scored == len(alone.choices[0].logprobs.token_logprobs or []) + 2
    assert "".join(p.choices[0].text for p in pieces if p.choices).startswith(PROMPT)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0)


def test_a_chat_streamed_with_usage(client: openai.OpenAI) -> None:
    pieces = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": "A fairy tale."},
                {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
            ],
            max_tokens=10,
            stream=True,
            stream_options={"include_usage": True},
            n=2,
        )
    )
    assert {p.choices[0].index for p in pieces if p.choices} == {0, 1}
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens <= 20


def test_an_answer_in_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"hero": {"enum": ["king", "queen"]}, "age": {"enum": [7, 70]}},
        "required": ["hero", "age"],
        "additionalProperties": False,
    }
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "hero", "schema": schema, "strict": True},
        },
    )
    answer = json.loads(chat.choices[0].message.content or "")
    assert answer["hero"] in ("king", "queen")
    assert chat.choices[0].finish_reason == "stop"


def test_errors_have_openais_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="king " * 5000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    assert wrong.value.param == "temperature"


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model=MODEL, input=["a king", "a queen"])
    vectors = [entry.embedding for entry in found.data]
    assert len(vectors) == 2
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-3)
    assert vectors[0] != vectors[1]


def test_curl(url: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4, "stream": True})
    command = [curl, "-sSN", f"{url}/v1/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-d", body], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    events = done.stdout.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)


def test_figures(client: openai.OpenAI, url: str) -> None:
    """What was generated is counted, by stage and node; each listener tells of its KV cache."""
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8)
    peers = [p["id"] for p in httpx.get(f"{url}/v1/peers", timeout=TIMEOUT_S).json()]
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def values(name: str) -> dict[str, float]:
        return {s.labels["node"]: s.value for s in samples if s.name == name}

    assert values("shardmesh_generated_tokens_total").popitem()[1] >= 8
    assert values("llm_model_requests_total").popitem()[1] >= 1
    assert values("shardmesh_stage_seconds_total").keys() == set(peers)
    assert values("shardmesh_kv_tokens").keys() == set(peers)
    assert values("shardmesh_kv_tokens_used").keys() == set(peers)


def test_pages_and_the_document(url: str) -> None:
    page = httpx.get(f"{url}/docs", timeout=TIMEOUT_S).text
    assert "https://" not in page, "it works without the network"
    assert httpx.get(f"{url}/docs/swagger-ui-bundle.js", timeout=TIMEOUT_S).status_code == 200
    assert httpx.get(f"{url}/health", timeout=TIMEOUT_S).json()["status"] == "ok"


def test_head_where_there_is_get(url: str) -> None:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as asker:
        for path, known in asker.get("/openapi.json").json()["paths"].items():
            if "get" in known and "{" not in path:
                answer = asker.head(path)
                assert (answer.status_code, answer.content) == (200, b""), path
        for path in ("/", "/docs", "/static/index.html"):
            length = asker.head(path).headers["content-length"]
            assert length == asker.get(path).headers["content-length"]


def test_who_goes_away_frees_its_sessions(url: str) -> None:
    """Both kinds of answer, on all stages: the model's only sequences are free again at once."""
    body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "n": 4, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as answer:
        for _, _ in zip(range(4), answer.iter_lines(), strict=False):
            pass
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=0.3)
    deadline_s = time.monotonic() + 20
    while status(url)["n_sessions"]:
        assert time.monotonic() < deadline_s, "sessions go on for nobody"
        time.sleep(0.02)
    figures = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    assert 'outcome="cancelled"' in figures


def status(url: str) -> dict[str, int]:
    answer: dict[str, int] = httpx.get(f"{url}/v1/node/status", timeout=TIMEOUT_S).json()
    return answer


def test_the_mesh_is_told_of(url: str, tmp_path: Path) -> None:
    info = httpx.get(f"{url}/v1/node/info", timeout=TIMEOUT_S)
    assert info.headers["X-Node-ID"] == info.json()["id"]
    peers = httpx.get(f"{url}/v1/peers", timeout=TIMEOUT_S).json()
    assert [peer["shard"]["shard_id"] for peer in peers] == [0, 1]
    assert all(peer["uuid"] and peer["name"] and not peer["name_clash"] for peer in peers)
    (model,) = httpx.get(f"{url}/v1/mesh", timeout=TIMEOUT_S).json()["models"]
    assert model["complete"]
    assert model["chain"] == [peer["id"] for peer in peers]
    with httpx.stream("GET", f"{url}/v1/events", timeout=TIMEOUT_S) as events:
        assert json.loads(next(events.iter_lines()).removeprefix("data: "))["kind"] == "hello"


SKIPPED = {"/v1/events"}  # answers without an end
CHECKS = (
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


def tame(body: Any) -> None:
    """Keeps an answer that was asked for short; the request stays as wild as it is."""
    if isinstance(body, dict) and ("prompt" in body or "messages" in body):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 2:
                body[name] = 2
        body.setdefault("max_tokens", 2)
        if isinstance(body.get("n"), int) and body["n"] > 2:
            body["n"] = 2
        for name in ("grammar", "response_format"):  # takes a process each time
            body.pop(name, None)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_made_up_requests_get_documented_answers(url: str, mode: GenerationMode) -> None:
    """No 500, and no status, type or form that the gateway's own document does not name."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    n_asked: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in SKIPPED:
            continue

        @settings(
            max_examples=N_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            if mode is GenerationMode.POSITIVE:
                tame(case.body)
            answer = case.call(timeout=TIMEOUT_S)
            case.validate_response(answer, checks=list(CHECKS))
            n_asked[case.operation.label] = n_asked.get(case.operation.label, 0) + 1

        try:
            ask()
        except Unsatisfiable:
            continue  # a request without anything to get wrong
    assert len(n_asked) > 5
