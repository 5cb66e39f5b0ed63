"""Which of two answers a judge prefers: a server, a command and a model, asked in both orders."""

import json
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from tests.building import small_opt
from tests.launching import run_command

from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.judging import judges
from isotune.evaluation.judging.judgement import Judging, judge_answers
from isotune.evaluation.judging.verdicts import Pair, read_verdict
from isotune.evaluation.judging.win_rates import length_controlled
from isotune.evaluation.models import generation_model_named
from isotune.evaluation.statistics.resampling import bootstrap_intervals, values
from isotune.io.errors import UserError

ALONE = Ranks(0, 1, torch.device("cpu"))
# a verdict of known preferences: gold is better than the rest, and of a question of taste the first answer wins
PREFERS = """
def verdict(text):
    first = text.split("[Answer A]")[1].split("[End of answer A]")[0]
    second = text.split("[Answer B]")[1].split("[End of answer B]")[0]
    if "taste" in text.split("[End of the question]")[0]:
        return "[[A]]"
    if "mumble" in text.split("[End of the question]")[0]:
        return "I would rather not say."
    better = ("gold" in first) - ("gold" in second)
    return "I thought about [[B]] too, but: " + {1: "[[A]]", 0: "[[C]]", -1: "[[B]]"}[better]
"""
ROWS = [
    {"id": 0, "prompt": "metal?", "text": "gold", "reference": "tin"},
    {"id": 1, "prompt": "metal, and why?", "text": "tin", "reference": "gold, since {first} {second}"},
    {"id": 2, "prompt": "a matter of taste", "text": "gold", "reference": "tin"},
    {"id": 3, "prompt": "metal?", "text": "lead", "reference": "tin"},
]
SCORES, ORDERS = [1.0, 0.0, 0.5, 0.5], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]]


class Stub(ThreadingHTTPServer):
    """A server with known preferences, which is busy when it is first asked for a completion."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.busy = 1

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answer(BaseHTTPRequestHandler):
    server: Any  # a Stub

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": "the-judge"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.busy:
            self.server.busy -= 1
            self._say(429, {}, {"Retry-After": "0"})
        elif self.path != "/v1/chat/completions":
            self._say(302, {}, {"Location": self.server.address + "/chat/completions"})
        else:
            self.server.bodies.append(body)
            self.server.tokens.append(self.headers["Authorization"])
            space: dict[str, Any] = {}
            exec(PREFERS, space)
            said = space["verdict"](body["messages"][0]["content"])
            self._say(200, {"choices": [{"message": {"content": said}}]})

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(tmp_path: Path) -> str:
    script = tmp_path / "judge.py"
    script.write_text(PREFERS + "import json, sys\nfor line in sys.stdin: print(verdict(json.loads(line)['text']))\n")
    return shlex.join([sys.executable, str(script)])


def against_references(judge: str, model: str | None = None) -> Judging:
    return Judging(judge, model, "reference", {row["id"]: row["reference"] for row in ROWS})


def test_a_server_is_asked_in_both_orders_and_a_preference_for_the_first_is_no_win(stub, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judged = judge_answers(against_references(stub.address), ROWS, ALONE, seed=0)
    assert judged is not None
    assert [row["judge"] for row in judged.of_rows] == SCORES
    assert [row["judge_orders"] for row in judged.of_rows] == ORDERS
    assert judged.scores.metrics["win_rate"] == np.mean(SCORES)
    assert judged.scores.metrics["judged_tie"] == 0.5 and judged.scores.metrics["position_agreement"] == 0.75
    assert judged.scores.intervals["win_rate"][0] < 0.5 < judged.scores.intervals["win_rate"][1]
    assert judged.facts == {
        "name": stub.address, "kind": "server", "against": "reference", "unreadable": 0, "model": "the-judge"
    }  # fmt: skip
    assert {body["model"] for body in stub.bodies} == {"the-judge"} and {b["temperature"] for b in stub.bodies} == {0}
    assert set(stub.tokens) == {"Bearer sk-secret"} and "sk-secret" not in "".join(capsys.readouterr())
    assert any("gold, since {first} {second}" in body["messages"][0]["content"] for body in stub.bodies)


def test_a_command_judges_as_the_server_does(command):
    judged = judge_answers(against_references(command), ROWS, ALONE, seed=0)
    assert judged is not None and judged.facts["kind"] == "command"
    assert [row["judge"] for row in judged.of_rows] == SCORES


def test_verdicts_that_cannot_be_read_are_ties_that_are_counted_and_most_of_them_an_error(command):
    mumbled = [*ROWS, {"id": 4, "prompt": "mumble", "text": "gold", "reference": "tin"}]
    others = {row["id"]: row["reference"] for row in mumbled}
    judged = judge_answers(Judging(command, None, "reference", others), mumbled, ALONE, seed=0)
    assert judged is not None and judged.facts["unreadable"] == 2
    assert judged.of_rows[-1] == {"judge": 0.5, "judge_orders": [0.5, 0.5]}
    with pytest.raises(UserError, match=r"2 \(100.0%\) of its 2 verdicts cannot be read"):
        judge_answers(Judging(command, None, "reference", others), mumbled[-1:], ALONE, seed=0)


@pytest.mark.parametrize(
    ("said", "share"),
    [("[[A]]", 1.0), ("not [[A]] but [[ B ]].", 0.0), ("tie", 0.5), (" b.", 0.0), ("C", 0.5), ("A is better", None)],
)
def test_a_verdict_is_the_last_mark_or_the_letter_alone(said, share):
    assert read_verdict(said) == share


def test_a_model_has_the_verdict_that_is_likeliest_behind_what_it_is_asked(shared_data):
    name = str(shared_data / "checkpoints" / "stories260K")
    lm = generation_model_named(name, torch.device("cpu"))
    pairs = [Pair("Who?", "A cat.", "A dog and a cat.", "row 0"), Pair("Why?", "So.", "", "row 1")]
    expected = []
    for pair in pairs:
        prompt = lm.encoder.prompt([{"role": "user", "content": pair.text}])
        nats = []
        for mark in ("A", "B", "C"):
            whole = lm.encoder.answered([{"role": "user", "content": pair.text}], f"[[{mark}]]", None)
            ids = torch.tensor([[*lm.encoder.prefix.tolist(), *lm.encoder.located(whole).ids.tolist()]])
            start = len(lm.encoder.prefix) + len(lm.encoder.located(prompt).ids)
            with torch.no_grad():
                logs = lm.model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            nats.append(sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        expected.append({0: 1.0, 1: 0.0, 2: 0.5}[int(np.argmax(nats))])
    assert judges.ModelJudge(name, lm, ALONE).verdicts(pairs) == expected


def test_the_length_of_answers_is_taken_out_of_the_win_rate():
    generator = np.random.default_rng(0)
    difference = generator.normal(40, 100, 300).round()
    scores = (generator.random(300) < expit(0.3 + 1.2 * np.tanh(difference / difference.std()))).astype(float)
    statistic = length_controlled(scores, difference)
    x = np.tanh(difference / difference.std())

    def loss(at):
        logits = at[0] + at[1] * x
        return (np.logaddexp(0, logits) - scores * logits).sum() + 5e-3 * (at**2).sum()

    best = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
    found = values([statistic])["win_rate_same_length"]
    assert found == pytest.approx(expit(best[0]), abs=1e-7)
    assert found < scores.mean() - 0.02, "these answers are longer, and length wins"
    low, high = bootstrap_intervals([statistic], 300)["win_rate_same_length"]
    assert low < found < high and 0.08 < high - low < 0.2
    assert values([length_controlled(scores, np.zeros(300))])["win_rate_same_length"] == scores.mean()
    assert values([length_controlled(np.ones(300), difference)])["win_rate_same_length"] > 0.99


@pytest.mark.parametrize(
    ("judge", "names"),
    [
        ("http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1/models cannot be asked"),
        ("http://127.0.0.1:port/v1", "http://127.0.0.1:port/v1/models cannot be asked: nonnumeric port"),
        ("it's", "is no command: No closing quotation"),
        (f"{sys.executable} -c 'print(1)'", "wrote 1 lines for 8 pairs"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no such tin\")'", "ended with 1: 'no such tin'"),
    ],
)
def test_a_judge_that_fails_is_one_sentence(monkeypatch, judge, names):
    monkeypatch.setattr(judges, "FIRST_WAIT_SECONDS", 0.0)
    with pytest.raises(UserError, match=names.replace("/", "\\/")):
        judge_answers(against_references(judge), ROWS, ALONE, seed=0)


def test_a_redirect_is_refused_with_the_token_unsent(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    stub.busy = 0
    with pytest.raises(UserError, match="answered 302"):
        judge_answers(against_references(stub.address + "/elsewhere", "the-judge"), ROWS, ALONE, seed=0)
    assert stub.tokens == []


def test_an_evaluation_with_a_judge_writes_its_verdicts_beside_another_models_answers(tmp_path, command):
    def evaluate(folder: str, *flags: str) -> Any:
        model = small_opt(tmp_path / "model")
        asked = ["eval/generate.py", "--model", model, "--dataset_name", "builtin:pirate", "--limit", "3"]
        out = str(tmp_path / folder)
        return run_command([sys.executable, *asked, "--max_new_tokens", "3", "--output_dir", out, *flags])

    first = evaluate("first", "--judge", command)
    assert first.returncode == 0, first.stderr
    facts = json.loads((tmp_path / "first" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "first" / "predictions.jsonl").read_text().splitlines()]
    assert facts["win_rate"] == np.mean([row["judge"] for row in rows]) and "win_rate" in facts["intervals"]
    assert facts["judge"]["against"] == "reference" and "each pair in both orders" in first.stdout
    beside = evaluate("second", "--judge", command, "--judge_against", str(tmp_path / "first"))
    assert beside.returncode == 0, beside.stderr
    facts = json.loads((tmp_path / "second" / "metrics.json").read_text())
    assert facts["win_rate"] == 0.5 and facts["judged_tie"] == 1.0, "the same answers"
    other = evaluate("third", "--judge", command, "--judge_against", str(tmp_path / "first"), "--limit", "2")
    assert other.returncode == 2 and "no evaluation of these 2 questions" in other.stderr
    early = evaluate("early", "--judge", "http://127.0.0.1:port/v1")
    assert early.returncode == 2 and "cannot be asked" in early.stderr
    assert "completion" not in early.stderr, "before anything is generated"
    typed = evaluate("typed", "--judge", "runs/my_jugde/model")
    assert typed.returncode == 2 and "is no run, no model, no command and no address" in typed.stderr
    assert "completion" not in typed.stderr
    assert evaluate("fourth", "--judge_model", "x").stderr == "error: --judge_model has no effect without --judge\n"
