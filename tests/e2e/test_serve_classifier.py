"""`isotune serve` of a classifier, as a real process: what it answers, what it refuses, how it begins and ends."""

import json
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.launching import run_command
from tests.serving import CLI, classifier_run, counts_at_rest, predictions_of, served

import isotune
from isotune.io.extras import install_command

TEXT = "I came across a film in 1999. My friends called it dreadful. To me the film was simply brilliant."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return classifier_run(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def server(run):
    with served(run, "--queue", "80", "--timeout", "60") as server:
        yield server


@pytest.fixture(scope="module")
def texts(run):
    """The texts of the stored predictions, in their order."""
    from isotune.data.sources.source import read_rows

    return [row["text"] for row in read_rows("builtin:opinions", "test").rows()]


def probabilities(prediction):
    return list(prediction["probabilities"].values())


def test_it_says_that_its_evaluation_is_what_it_serves_before_it_answers(server):
    out, err = server.printed()
    lines = out.splitlines()
    assert lines[-2].startswith("replayed    120 of 120 identical (") and lines[-1].startswith("serving     ")
    assert "Traceback" not in err and "error" not in err
    info = server.client.get("/info").json()
    assert (info["replayed"], info["kind"], info["labels"]) == ("120 of 120 identical", "classifier", ["0", "1", "2"])
    assert server.client.get("/health").json()["status"] == "ok"


def test_a_text_has_the_probabilities_of_the_evaluation(server, run, texts):
    stored = predictions_of(run)
    answer = server.post("/predict", {"texts": texts}).json()
    for line, prediction in zip(stored, answer["predictions"], strict=True):
        assert np.abs(np.array(line["probabilities"]) - probabilities(prediction)).max() < 1e-6
        assert prediction["label"] == str(line["prediction"])
    (one,) = server.post("/predict", {"text": texts[0]}).json()["predictions"]
    assert probabilities(one) == pytest.approx(probabilities(answer["predictions"][0]), abs=1e-6)


def test_sixty_four_clients_at_once_are_answered_in_few_forwards_as_each_alone(server, texts):
    alone = [server.post("/predict", {"text": text}).json()["predictions"][0] for text in texts[:64]]
    before = counts_at_rest(server)
    gate = threading.Barrier(64)

    def ask(text):
        gate.wait()
        return server.post("/predict", {"text": text})

    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(ask, texts[:64]))
    assert [answer.status_code for answer in answers] == [200] * 64
    for one, answer in zip(alone, answers, strict=True):
        assert probabilities(answer.json()["predictions"][0]) == pytest.approx(probabilities(one), abs=1e-6)
    after = counts_at_rest(server)
    assert after["done"] - before["done"] == 64 and after["batches"] - before["batches"] < 40


def test_a_long_text_is_cut_as_in_training_and_that_is_said(server):
    (prediction,) = server.post("/predict", {"text": TEXT * 40}).json()["predictions"]
    assert prediction["tokens_read"] == 64 < prediction["tokens"]


def test_words_have_shares_that_add_up(server):
    found = server.post("/attributions", {"text": TEXT, "label": "2"}).json()
    assert (found["method"], found["label"]) == ("integrated gradients", "2")
    assert [word.lower() for word in found["words"][:3]] == ["i", "came", "across"]
    (prediction,) = server.post("/predict", {"text": TEXT}).json()["predictions"]
    assert found["output"] == pytest.approx(prediction["probabilities"]["2"], abs=1e-5)
    assert abs(found["rest"]) < 1e-4
    assert server.post("/attributions", {"text": TEXT, "label": "9"}).json()["error"]["code"] == "no_such_label"


def test_similar_errors_are_errors_of_the_evaluation(server, run, texts):
    wrong = {line["id"]: line for line in predictions_of(run) if line["prediction"] != line["label"]}
    assert server.client.get("/info").json()["errors"] == len(wrong) > 0
    row = next(iter(wrong))
    found = server.post("/similar", {"text": texts[row]}).json()["errors"]
    assert found[0]["id"] == row and found[0]["text"] == texts[row] and found[0]["similarity"] == pytest.approx(1)
    assert {error["id"] for error in found} <= wrong.keys()
    assert [error["similarity"] for error in found] == sorted((e["similarity"] for e in found), reverse=True)
    assert server.post("/similar", {"text": "zzz qqq"}).json()["errors"] == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"texts": []}, 400, "wrong_value"),
        ({"text": "a", "tezt": "b"}, 400, "unknown_key"),
        ({"text": "a", "text_pair": "b"}, 400, "wrong_form"),
        ({"texts": ["a"] * 257}, 400, "too_many"),
        ({"text": "\ud800"}, 400, "not_a_text"),
        ({"text": "a" * 2**20}, 413, "too_large"),
    ],
)
def test_what_cannot_be_classified_is_refused_with_a_sentence(server, body, status, code):
    answer = server.client.post("/predict", content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["message"] and "\n" not in error["message"]


def test_what_is_no_request_is_refused_as_json_too(server):
    json_type = {"content-type": "application/json"}
    assert server.client.post("/predict", content=b"{", headers=json_type).json()["error"]["code"] == "not_json"
    assert server.client.post("/predict", content=b"[" * 10**5, headers=json_type).json()["error"]["code"] == "not_json"
    assert server.client.post("/predict", content=b"a=b").status_code == 415
    assert server.client.get("/nowhere").json()["error"]["code"] == "no_such_page"
    assert server.client.get("/predict").status_code == 405
    assert server.client.get("/static/../server.py").status_code == 404
    assert server.client.get("/static/%2e%2e/server.py").status_code == 404
    assert server.post("/v1/chat/completions", {"messages": []}).status_code == 404
    assert server.post("/predict", {"text": "a"}, headers={"host": "evil.example"}).status_code == 403
    assert server.post("/predict", {"text": "a"}, headers={"origin": "https://evil.example"}).status_code == 403


def test_a_stop_answers_what_is_in_flight_and_ends_with_0(run, texts):
    with served(run, "--no_replay") as server:
        answers = []
        body = json.dumps({"texts": texts}).encode()

        def ask():
            answers.append(
                server.client.post("/predict", content=slowly(body), headers={"content-type": "application/json"})
            )

        def slowly(content):
            yield content[:100]
            time.sleep(1.0)
            yield content[100:]

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.4)
        assert server.stop(signal.SIGINT) == 0
        asking.join(30)
        assert [answer.status_code for answer in answers] == [200]
        assert len(answers[0].json()["predictions"]) == len(texts)
        out, err = server.printed()
        assert out.splitlines()[-1].startswith("serving ") and err == "" and "replayed" not in out


def serve(*words, expect=2):
    done = run_command([*CLI, "serve", *map(str, words)], timeout_seconds=120)
    assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ") and all(line.startswith("preparing") or not line for line in before)
    return last


def test_a_model_that_is_not_the_evaluated_one_is_refused(run, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(run, other)
    weights = load_file(other / "model" / "model.safetensors")
    weights["classifier.bias"][1] += 1e-4
    save_file(weights, other / "model" / "model.safetensors", metadata={"format": "pt"})
    said = serve(other, "--port", 0)
    assert "120 of 120 predictions in" in said and "are not what the model says now" in said and "--no_replay" in said
    (metrics,) = (other / "eval").glob("*/metrics.json")
    shutil.rmtree(metrics.parent)
    assert "has no evaluation to replay: isotune eval" in serve(other, "--port", 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("RUN", "--port", "70000"), "--port is 70000: it is 0 to 65535"),
        (("RUN", "--queue", "0"), "--queue is 0"),
        (("RUN", "--timeout", "-1"), "--timeout is -1"),
        (("RUN", "--no_replay", "--replay", "3"), "exclude each other"),
        (("RUN", "--host", "0.0.0.0"), "say them by --names"),
        (("/nowhere/run",), "there is no run directory /nowhere/run"),
        ((), "required: RUN"),
    ],
)
def test_a_mistake_is_one_sentence(run, words, says):
    assert says in serve(*(run if word == "RUN" else word for word in words))


def test_a_port_that_is_taken_is_named_before_the_model_is_opened(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port} cannot be had" in serve(run, "--port", port)


def test_a_missing_extra_is_one_sentence(run, monkeypatch):
    from isotune.commands.trained import serve as command
    from isotune.io.errors import UserError

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("isotune.io.extras.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match="isotune serve needs uvicorn") as refused:
        command.run([str(run)])
    assert install_command("uvicorn") == "pip install 'isotune[serve]'" and install_command("uvicorn") in str(
        refused.value
    )


def test_it_is_the_model_that_python_predicts_with(server, run):
    ((label, probability),) = isotune.load(run).predict(TEXT)
    (prediction,) = server.post("/predict", {"text": TEXT}).json()["predictions"]
    assert str(label) == prediction["label"]
    assert max(probabilities(prediction)) == pytest.approx(probability, abs=1e-6)


@pytest.fixture(scope="module")
def ensembles(run, tmp_path_factory):
    """The run and one with other weights, blended by equal weights, and by weights fitted to the same rows."""
    import shutil

    from accelerate.state import AcceleratorState
    from safetensors.torch import load_file, save_file

    from isotune.commands.trained import evaluate_classifier
    from isotune.evaluation.ensemble import build_ensemble

    folder = tmp_path_factory.mktemp("ensembles")
    other = folder / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "eval")
    weights = load_file(other / "model" / "model.safetensors")
    weights["classifier.weight"] *= -0.5
    save_file(weights, other / "model" / "model.safetensors", metadata={"format": "pt"})
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--run_dir", str(other), "--resamples", "20", "--no_pictures"]
    evaluate_classifier.evaluate_classifier(evaluate_classifier.read_arguments(flags, prog="eval", description=""))
    (name,) = (file.parent.name for file in other.glob("eval/*/.evaluation.json"))
    build_ensemble([run, other], folder / "equal", name=name, resamples=100)
    build_ensemble([run, other], folder / "fitted", name=name, weights="fitted", folds=3, resamples=100)
    return folder


def test_an_ensemble_is_served_like_a_run_with_the_mean_of_what_its_members_say(ensembles, run, texts):
    members = [predictions_of(run), predictions_of(ensembles / "other")]
    with served(ensembles / "equal", "--queue", "80") as server:
        assert "replayed    120 of 120 identical (" in server.printed()[0]
        info = server.client.get("/info").json()
        assert (info["model"], info["kind"], info["replayed"]) == ("equal", "classifier", "120 of 120 identical")
        predictions = server.post("/predict", {"texts": texts}).json()["predictions"]
        wrong = 0
        for one, two, prediction in zip(*members, predictions, strict=True):
            mean = (np.array(one["probabilities"]) + np.array(two["probabilities"])) / 2
            assert np.abs(mean - probabilities(prediction)).max() < 1e-6
            assert prediction["label"] == str(mean.argmax())
            wrong += mean.argmax() != one["label"]
        assert info["errors"] == wrong > 0
        cut = server.post("/predict", {"text": TEXT * 40}).json()["predictions"][0]
        assert cut["tokens_read"] == 64 < cut["tokens"]
        found = server.post("/attributions", {"text": TEXT, "label": "2"}).json()
        (prediction,) = server.post("/predict", {"text": TEXT}).json()["predictions"]
        assert found["output"] == pytest.approx(prediction["probabilities"]["2"], abs=1e-5)
        total = sum(found["shares"]) + found["rest"]
        assert abs(total - (found["output"] - found["blank_output"])) < 1e-2 and abs(found["rest"]) < 1e-4
        assert server.post("/similar", {"text": texts[0]}).status_code == 200
        assert server.client.get("/").status_code == 200
        assert server.stop() == 0


def test_weights_that_were_fitted_by_folds_are_replayed_with_those_that_are_served(ensembles):
    import torch

    from isotune.evaluation.models import load_run_classifier
    from isotune.evaluation.prediction.ensembles import read_ensemble
    from isotune.io.errors import UserError
    from isotune.serving.classification.ensemble import open_service
    from isotune.serving.classification.ensemble_replay import BY_FOLDS, replay_ensemble

    saved = read_ensemble(ensembles / "fitted")
    service = open_service(saved, lambda run: load_run_classifier(run, torch.device("cpu"), torch.float32))
    replayed, errors = replay_ensemble(service, 50)
    assert (replayed.identical, replayed.of, replayed.note) == (50, 50, BY_FOLDS)
    assert errors and {"id", "actual", "predicted", "text"} <= errors[0].keys()
    service.members[1].model.classifier.bias.data[1] += 1e-3
    with pytest.raises(UserError, match=r"^50 of 50 predictions in .* are not what the model says now"):
        replay_ensemble(service, 50)[0].check()
    saved.weights[:] = saved.weights[::-1].copy()
    with pytest.raises(UserError, match=r"it blends other runs than ensemble\.json, or with other weights"):
        replay_ensemble(service, 50)
