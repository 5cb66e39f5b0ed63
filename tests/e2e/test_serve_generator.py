"""`isotune serve` of a language model, as a real process: by OpenAI's own client package, and by hand."""

import http.client
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
from tests.serving import counts_at_rest, generator_run, predictions_of, served

from isotune.evaluation.generation.chat import answer
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.models import generation_model_of_run

HI = [{"role": "user", "content": "Greet Ada in German."}]
LONG = [{"role": "user", "content": "Greet " * 20}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return generator_run(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def lm(run):
    return generation_model_of_run(run)


@pytest.fixture(scope="module")
def server(run):
    with served(run, "--queue", "80", "--timeout", "60", "--max_new_tokens", "200") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-never-printed", max_retries=0)


def test_it_says_that_its_evaluation_is_what_it_serves(server):
    out, _ = server.printed()
    assert out.splitlines()[-2].startswith("replayed    16 of 16 identical (")
    assert server.client.get("/info").json()["form"] == "Guanaco's form"


def test_the_client_package_gets_the_answer_of_the_prompt_alone(client, lm, run):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("run").id) == (run.name, "run")
    done = client.chat.completions.create(model="run", messages=HI, max_tokens=12)
    choice = done.choices[0]
    assert choice.message.content == answer(lm, HI, Decoding(max_new_tokens=12))
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert done.usage.prompt_tokens == lm.token_count(lm.encoder.prompt(HI))
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_a_stream_of_the_client_package_adds_up_to_the_answer(client, lm):
    expected = answer(lm, LONG, Decoding(max_new_tokens=24))
    asked = {"model": "run", "messages": LONG, "max_completion_tokens": 24}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-1].choices == [] and 0 < chunks[-1].usage.completion_tokens <= 24


def test_the_stored_answers_of_the_evaluation_are_given(client, run):
    for line in predictions_of(run)[:3]:
        done = client.chat.completions.create(
            model="run", messages=[{"role": "user", "content": line["prompt"]}], max_tokens=12
        )
        assert done.choices[0].message.content == line["text"]


def test_plain_texts_are_gone_on_with_as_they_stand(client, lm):
    prompts = ["Once upon a time", "Greet"]
    done = client.completions.create(model="run", prompt=prompts, max_tokens=6)
    alone = [complete(lm, [Prompt(0, prompt)], Decoding(max_new_tokens=6), turns=False)[0].text for prompt in prompts]
    assert [choice.text for choice in done.choices] == alone and [c.index for c in done.choices] == [0, 1]
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(model="run", prompt=prompts, max_tokens=6, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == alone


def test_sixty_four_clients_at_once_get_what_each_gets_alone(client, server, lm):
    names = [
        f"Greet {name} in {language}."
        for name in ("Ada", "Ben", "Cleo", "Dan")
        for language in ("German", "Dutch", "Italian", "French")
    ]
    expected = {name: answer(lm, name, Decoding(max_new_tokens=10)) for name in names}
    gate = threading.Barrier(64)

    def ask(number):
        gate.wait()
        name = names[number % len(names)]
        messages = [{"role": "user", "content": name}]
        if number % 2:
            chunks = client.chat.completions.create(model="run", messages=messages, max_tokens=10, stream=True)
            return name, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        done = client.chat.completions.create(model="run", messages=messages, max_tokens=10)
        return name, done.choices[0].message.content

    before = counts_at_rest(server)
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(ask, range(64)))
    assert answers == [(name, expected[name]) for name, _ in answers]
    after = counts_at_rest(server)
    assert after["done"] - before["done"] == 64 and after["batches"] - before["batches"] < 40


def test_a_seed_draws_the_same_answer_again(client, lm):
    asked = {"model": "run", "messages": HI, "max_tokens": 8, "temperature": 1.5, "seed": 3}
    first, second = (client.chat.completions.create(**asked).choices[0].message.content for _ in range(2))
    assert first == second == answer(lm, HI, Decoding(max_new_tokens=8, temperature=1.5, seed=3))


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found"),
        ({"max_tokens": 201}, 400, "too_long"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "bad_messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "bad_messages"),
        ({"top_p": 0.5}, 400, "no_effect"),
        ({"n": 3}, 400, "wrong_value"),
        ({"extra_body": {"repetition_penalty": 1.1}}, 400, "unknown_key"),
    ],
)
def test_what_it_cannot_do_is_an_error_of_the_client_package(client, changed, status, code):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "run", "messages": HI, "max_tokens": 4, **changed})
    assert (refused.value.status_code, refused.value.code) == (status, code)


@pytest.fixture(scope="module")
def long(server):
    """What is gone on with by 100 tokens, as no eos ends it."""
    body = {"prompt": "Greet", "max_tokens": 100, "temperature": 2.0}
    for seed in range(50):
        if server.post("/v1/completions", {**body, "seed": seed}).json()["usage"]["completion_tokens"] == 100:
            return {**body, "seed": seed}
    raise AssertionError("an eos ends each of them")


def test_a_client_that_leaves_does_not_keep_the_model_busy(server, long):
    before = counts_at_rest(server)
    with server.client.stream("POST", "/v1/completions", json={**long, "stream": True}) as response:
        next(response.iter_lines())
    after = counts_at_rest(server)
    assert after["done"] - before["done"] == 1 and 0 < after["tokens"] - before["tokens"] < 100


def test_a_client_that_leaves_a_stream_before_its_first_word_is_not_answered(server, long):
    def asked_so_far():
        counts = server.client.get("/health").json()["requests"]
        return counts["done"] + counts["running"] + counts["waiting"]

    before, others, ends = counts_at_rest(server)["done"], 4, time.monotonic() + 60
    leaving = http.client.HTTPConnection(urlsplit(server.url).netloc)
    with ThreadPoolExecutor(others) as pool:
        for _ in range(others):
            pool.submit(server.post, "/v1/completions", long)
        while asked_so_far() < before + others:
            assert time.monotonic() < ends
        body = json.dumps({**long, "stream": True})
        leaving.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        while asked_so_far() < before + others + 1:
            assert time.monotonic() < ends
        leaving.close()
    assert counts_at_rest(server)["done"] == before + others


def test_nothing_that_was_asked_or_said_as_a_password_is_printed(server, client):
    client.chat.completions.create(model="run", messages=[{"role": "user", "content": "hush hush"}], max_tokens=2)
    out, err = server.printed()
    assert "hush" not in err and "sk-never" not in err and "sk-never" not in out and "hush" not in out


def test_a_time_limit_ends_an_answer_with_an_error_and_a_stop_finishes_a_stream(run):
    with served(run, "--no_replay", "--timeout", "0.3", "--max_new_tokens", "5000") as server:
        late = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 200, "temperature": 2, "seed": 5})
        if late.status_code != 200:  # a fast machine may be done
            assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
    with served(run, "--no_replay", "--max_new_tokens", "150") as server:
        body = {"messages": LONG, "max_tokens": 150, "stream": True, "temperature": 1.9, "seed": 2}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert server.process.wait(30) == 0
