"""Which requests reach the server: this machine's programs and its own page, and no page of anybody else's."""

import asyncio
import json

import pytest

from isotune.io.errors import UserError
from isotune.serving.guard import LOOPBACK, Guard
from isotune.serving.server import Address

JSON = {"content-type": "application/json"}


def ask(method="POST", names=LOOPBACK, **headers):
    """The status, error code and headers of the answer to a request with these headers; 200 where it got through."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message):
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/predict", "headers": raw}
    asyncio.run(Guard(app, names)(scope, None, send))
    body = json.loads(sent[1]["body"])
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], body.get("error", {}).get("code"), answered


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "127.0.0.1:9"])
def test_a_program_on_this_machine_is_answered(host):
    assert ask(host=host, **JSON)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8000",
        "",
        "[::1",
        "@localhost:x",
    ],
)
def test_a_name_that_was_bound_to_loopback_elsewhere_is_refused(host):
    assert ask(host=host, **JSON)[:2] == (403, "wrong_host")
    assert ask("GET", host=host)[:2] == (403, "wrong_host")


def test_a_request_without_a_host_or_with_two_is_refused():
    assert ask(**JSON)[:2] == (403, "wrong_host")
    twice = {"type": "http", "method": "GET", "headers": [(b"host", b"localhost"), (b"host", b"evil.example")]}
    with pytest.raises(Exception, match="not asked under the name"):
        Guard(None, LOOPBACK)._check(twice)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://localhost:8000.evil.example", "file://"]
)
def test_a_page_elsewhere_cannot_drive_it(origin):
    assert ask(host="localhost:8000", origin=origin, **JSON)[:2] == (403, "wrong_origin")


def test_its_own_page_can():
    assert ask(host="localhost:8000", origin="http://localhost:8000", sec_fetch_site="same-origin", **JSON)[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_says_that_another_page_asks_is_believed(site):
    assert ask(host="localhost:8000", sec_fetch_site=site, **JSON)[:2] == (403, "wrong_origin")
    assert ask("GET", host="localhost:8000", sec_fetch_site=site)[0] == 200  # a link to the page


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_of_another_page_can_send_is_no_request(media):
    assert ask(host="localhost:8000", content_type=media)[:2] == (415, "not_json")


def test_no_answer_lets_another_origin_read_it_or_the_page_load_anything_from_elsewhere():
    for answered in (ask(host="localhost", **JSON)[2], ask(host="evil.example", **JSON)[2]):
        assert not [name for name in answered if name.startswith("access-control")]
        policy = answered["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "http" not in policy and "unsafe" not in policy
        assert answered["cross-origin-resource-policy"] == "same-origin"


def test_other_names_are_those_that_the_user_says():
    names = Address("0.0.0.0", 8000, ("box.lab",)).all_names
    assert ask(names=names, host="box.lab:8000", **JSON)[0] == 200
    assert ask(names=names, host="0.0.0.0:8000", **JSON)[:2] == (403, "wrong_host")
    assert ask(names=Address("10.0.0.7").all_names, host="10.0.0.7:8000", **JSON)[0] == 200
    with pytest.raises(UserError, match="say them by --names"):
        Address("0.0.0.0").check()
