"""Who may look at the page of ``metaclaw open``, and that nobody can do more than look."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from e2e_tools import environment
from judge_tools import assistant, exchange, result, user

from metaclaw_core.model import Injection
from metaclaw_core.skills.library import Library
from metaclaw_core.skills.skill import Skill
from metaclaw_core.store.db import open_store
from metaclaw_core.store.spool import SpoolWriter
from metaclaw_core.view.site import Site

TOOL = str(Path(sys.executable).with_name("metaclaw"))
PAGES = ("/", "/skills", "/worker", "/training", "/static/style.css", "/static/live.js")


def get(url: str, method: str = "GET", **options) -> httpx.Response:
    """From nobody known."""
    with httpx.Client(trust_env=False) as client:
        return client.request(method, url, **options)


def raw(port: int, text: bytes) -> bytes:
    """What comes back for these very bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text)
        back = b""
        while data := connection.recv(65536):
            back += data
    return back


def test_the_token_buys_a_strict_cookie_and_is_worthless_then(process_page):
    page = process_page
    first = get(page.url)
    assert first.status_code == 200
    name, _, attributes = first.headers["set-cookie"].partition("=")
    assert name == f"metaclaw-{page.port}"
    assert attributes.split("; ")[1:] == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert '<meta http-equiv="refresh" content="0;url=/">' in first.text
    assert page.token not in first.text
    second = get(page.url)
    assert second.status_code == 403
    assert "set-cookie" not in second.headers
    assert "This link was used already" in second.text
    cookie = {"Cookie": first.headers["set-cookie"].partition(";")[0]}
    assert "<h1>Sessions</h1>" in get(page.at("/"), headers=cookie).text
    again = get(page.url, headers=cookie)  # a reload of the address by the one who has used it
    assert (again.status_code, "set-cookie" in again.headers) == (200, False)


def test_of_many_who_come_with_the_token_at_once_one_gets_in(page):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: get(page.url), range(24)))
    assert sorted(answer.status_code for answer in answers) == [200] + [403] * 23


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_shown_without_the_cookie(page, path):
    for headers in ({}, {"Cookie": f"metaclaw-{page.port}=guess"}, {"Cookie": "metaclaw-1=x; =;;\x01"}, {"Cookie": f"metaclaw-{page.port}="}):
        answer = get(page.at(path), headers=headers)
        assert answer.status_code == 403
        assert "<h1>" not in answer.text
    assert get(page.at(f"{path}?token=guess")).status_code == 403
    assert get(page.url).status_code == 200  # wrong guesses cost nobody the right one


def test_looking_whether_the_address_is_there_does_not_use_it_up(page):
    assert get(page.url, "HEAD").status_code == 403
    assert get(page.url).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", "[::1]:{port}", ""],
)
def test_a_page_that_was_rebound_to_this_address_gets_nothing(page, reader, host):
    host = host.format(port=page.port)
    for path in ("/", f"/?token={page.token}", "/static/style.css"):
        answer = reader.get(path, headers={"Host": host})
        assert answer.status_code == 403
        assert "only reached under its own address" in answer.text


def test_the_token_is_not_used_up_under_a_wrong_host(page):
    assert get(page.url, headers={"Host": "evil.example"}).status_code == 403
    assert get(page.url, headers={"Host": f"localhost:{page.port}"}).status_code == 200


def test_two_hosts_no_host_and_a_whole_url_are_refused(page, reader):
    cookie = "; ".join(f"{name}={value}" for name, value in reader.cookies.items())
    own = f"Host: 127.0.0.1:{page.port}\r\nCookie: {cookie}\r\n"
    assert raw(page.port, f"GET / HTTP/1.1\r\n{own}\r\n".encode()).startswith(b"HTTP/1.0 200 ")
    for head in (
        f"GET / HTTP/1.1\r\n{own}Host: evil.example\r\n\r\n",
        f"GET / HTTP/1.1\r\nCookie: {cookie}\r\n\r\n",
        f"GET http://evil.example/ HTTP/1.1\r\n{own}\r\n",
    ):
        assert raw(page.port, head.encode()).startswith(b"HTTP/1.0 403 ")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_only_reading_is_possible(page, reader, method):
    answer = reader.request(method, "/", content=b"x=1")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert "access-control-allow-origin" not in answer.headers


def test_a_head_has_the_headers_of_a_page_and_no_body(reader):
    answer = reader.head("/")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) > 500
    assert answer.content == b""


@pytest.mark.parametrize("path", [*PAGES, "/nothing", "/session/abc", "/turn/1", "/skill?name=x"])
def test_every_answer_forbids_foreign_content_frames_and_storing(page, reader, path):
    for answer in (reader.get(path), get(page.at(path)), reader.post(path)):
        policy = answer.headers["content-security-policy"]
        assert policy.split("; ")[0] == "default-src 'self'"
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["server"] == "metaclaw"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_can_use_nothing_even_with_the_cookie(reader, site):
    for path in ("/", "/static/live.js"):
        answer = reader.get(path, headers={"Sec-Fetch-Site": site, "Origin": "http://evil.example"})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example", "/%2f%2fevil.example", "/..//evil.example", "/session/../../x", "/nowhere"])
def test_the_token_leads_to_a_page_of_ours_only(page, path):
    answer = raw(page.port, f"GET {path}?token={page.token} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 200 ")
    assert b'content="0;url=/">' in answer
    assert b"evil" not in answer


@pytest.mark.parametrize("bytes_", [b"\r\n", b"nonsense\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_request_gets_an_error_and_the_page_stays(page, reader, bytes_):
    raw(page.port, bytes_)
    assert reader.get("/").status_code == 200


def test_strange_queries_are_no_failure(reader, page):
    for path in ("/?page=0", "/?page=99999999999", "/?page=-1", "/?page=x", "/?" + "&a=1" * 30, "/skill", "/turn/999999999999999999", "/session/00"):
        assert reader.get(path).status_code in (200, 404)
    assert page.complaints() == ""


def test_the_page_listens_on_loopback_only(process_page):
    page = process_page
    listening = Path("/proc/net/tcp").read_text().splitlines()
    addresses = [line.split()[1] for line in listening[1:] if line.split()[3] == "0A"]
    assert [a for a in addresses if a.endswith(f":{page.port:04X}")] == [f"0100007F:{page.port:04X}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_without_a_word_of_python(process_page, number):
    page = process_page
    page.process.send_signal(number)
    assert page.process.wait(20) == 0
    assert page.complaints() == ""
    with pytest.raises(httpx.ConnectError):
        get(page.at("/"))


def test_a_port_that_is_taken_is_said_in_a_sentence(page, metaclaw_home):
    line = [TOOL, "open", "--no-browser", "--port", str(page.port)]
    ran = subprocess.run(line, env=environment(metaclaw_home), capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"metaclaw: Port {page.port} of 127.0.0.1 can't be used (Address already in use): leave --port out for a free one.\n"


# --- what is on it ------------------------------------------------------------------------------


def test_an_empty_home_has_all_pages(reader):
    assert "No exchange has been recorded yet." in reader.get("/").text
    assert "git-rebase-conflicts" in reader.get("/skills").text
    assert "None has had anything to do." in reader.get("/worker").text


def test_every_link_of_the_recordings_leads_to_a_page(recorded, page, reader):
    seen, waiting = {"/"}, ["/"]
    while waiting:
        answer = reader.get(waiting.pop())
        assert answer.status_code == 200
        for piece in answer.text.split('href="')[1:]:
            link = piece.partition('"')[0]
            assert link.startswith("/")
            if link not in seen and len(seen) < 150:
                seen.add(link)
                waiting.append(link)
    assert len([link for link in seen if link.startswith("/turn/")]) > 40
    assert page.complaints() == ""


def test_a_turn_says_what_was_added_and_why_and_how_it_was_judged(recorded, reader):
    with open_store(recorded / "store.db") as store:
        one, two, three = (row for row in store.turns() if row["injected"])
    text = reader.get(f"/turn/{three['id']}").text
    assert f'<a href="/turn/{one["id"]}">' in text  # where the first skill came in
    assert re.findall(r'<td class="n">(11\.25|–)</td>', text) == ["11.25", "–"]  # how well each fitted, where that is known
    assert "My rebase onto main stopped with a conflict in app/routes.py. Can you sort it out?" in text
    assert "this request" in text  # where the second did
    assert "generation 8 of the skill index" in text
    assert "The notes name no change that a reader would know." in text
    assert '<span class="verdict bad">-1</span>' in text
    assert "Release 1.4: conflict-free routes." in text
    session = reader.get(f"/session/{two['session']}").text
    assert session.count('<section class="turn main">') == 2
    assert '<a class="chip new" href="/skill?name=release-notes-style">release-notes-style</a>' in session
    assert '<a class="chip" href="/skill?name=git-rebase-conflicts">git-rebase-conflicts</a>' in session


def test_skills_have_their_counters_and_the_quarantined_are_told_apart(recorded, reader):
    text = reader.get("/skills").text
    for heading in ("Candidate", "Active", "Quarantined"):
        assert f">{heading}</h2>" in text
    assert text.index(">Quarantined</h2>") < text.index("forward-all-mail")
    one = reader.get("/skill?name=release-notes-style").text
    assert "<b>1</b> turns in <b>1</b> sessions" in one
    assert "mean score with it <b>-1.00</b>, without <b>–</b>" in one
    assert "said once" in one
    assert "Learned 2026-11-25T09:00:00+00:00 by writer-1" in one


def test_the_worker_has_its_runs_notices_and_tokens(recorded, reader):
    text = reader.get("/worker").text
    for piece in ("The LLM did not answer.", "scored: 2", "Skills are written with your agent&#39;s own key.", "judge-1", "5,100", "2.5 s"):
        assert piece in text


def test_what_was_never_counted_is_not_a_zero(recorded, reader):
    with open_store(recorded / "store.db") as store:
        unknown = next(row for row in store.turns() if row["usage"] is None)
    assert "– → –</span> tokens" in reader.get(f"/turn/{unknown['id']}").text


def test_a_long_session_comes_in_pages(metaclaw_home, reader):
    history = []
    with open_store(metaclaw_home / "store.db") as store:
        some = []
        for n in range(210):
            history.append(user(f"Question {n}?"))
            some.append(exchange(n, list(history), f"Answer {n}."))
            history.append(assistant(f"Answer {n}."))
        store.ingest(some)
        (session,) = {row["session"] for row in store.turns()}
    newest, oldest = (reader.get(f"/session/{session}?page={n}").text for n in (1, 2))
    assert "Question 209?" in newest
    assert "page 1 of 2" in newest
    assert "Question 9?" in oldest
    assert "Question 10?" not in oldest


def test_an_exchange_that_is_still_in_a_spool_is_shown(metaclaw_home, reader):
    assert "No exchange has been recorded yet." in reader.get("/").text
    (metaclaw_home / "spool").mkdir()
    with SpoolWriter(metaclaw_home / "spool" / "1.db") as spool:
        spool.append([exchange(1, [user("Straight from the spool?")])])
    time.sleep(1.1)
    assert "Straight from the spool?" in reader.get("/").text


# --- data is data -------------------------------------------------------------------------------

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}</pre></textarea>\x1b]0;owned\x07\u202eevil\x00\udc80"
NAME = HOSTILE[:-2]  # a skill's name: the database takes neither NUL nor a lone surrogate in it


@pytest.fixture
def hostile(metaclaw_home):
    """A store in which everybody who could, wrote markup; the row and the session of its turn."""
    messages = [
        {"role": "system", "content": HOSTILE},
        user("Before."),
        assistant(HOSTILE, [("c1", HOSTILE, HOSTILE)]),
        result("c1", HOSTILE),
        user(HOSTILE),
        assistant("", [("c2", HOSTILE, HOSTILE)]),
        result("c2", HOSTILE),
    ]
    with open_store(metaclaw_home / "store.db") as store:
        injection = Injection(HOSTILE, (NAME, "javascript:alert(1)"), 1)
        store.ingest([exchange(1, messages, HOSTILE, [(HOSTILE, HOSTILE)], injection=injection, host="a.example<b>", path="/v1/chat/completions?x=<i>")])
        (row,) = store.turns()
    library = Library(metaclaw_home / "skills")
    library.add(Skill("plain-name", f"Says {HOSTILE}".replace("\x00", "").replace("\udc80", ""), "<script>alert(3)</script>", triggers=("<b>",)))
    bad = metaclaw_home / "skills" / "<img src=x onerror=alert(4)>"
    bad.mkdir()
    (bad / "SKILL.md").write_text("---\nname: '<script>'\n---\n")
    return row


def test_markup_in_what_was_said_is_text(hostile, reader):
    pages = ["/", f"/session/{hostile['session']}", f"/turn/{hostile['id']}", "/skills", "/skill?name=plain-name"]
    for path in pages:
        answer = reader.get(path)
        assert answer.status_code == 200
        assert answer.text.count("<script") == 1  # our own
        assert "&lt;script&gt;" in answer.text
        for markup in ("<img", "<b>ex", "<i>", "{{ 49", "></textarea>", 'href="javascript:'):
            assert markup not in answer.text
        assert not set("\x1b\x07\u202e\x00") & set(answer.text)


def test_a_name_full_of_markup_is_a_link_to_its_own_page(hostile, reader):
    address = "/skill?name=" + quote(NAME.replace("\x1b", "\ufffd").replace("\x07", "\ufffd").replace("\u202e", "\ufffd"), safe="")
    assert f'href="{address}"' in reader.get(f"/turn/{hostile['id']}").text
    assert reader.get(f"/skill?name={quote(NAME, safe='')}").text.count("<script") == 1


def test_a_template_cannot_be_told_to_trust_what_it_prints(tmp_path):
    from importlib.resources import files

    folder = files("metaclaw_core.view") / "templates"
    for template in folder.iterdir():
        text = template.read_text()
        assert "|safe" not in text.replace(" ", "")
        assert "autoescape" not in text
        assert "<script>" not in text
        assert " style=" not in text
        assert " on" not in [piece[:3] for piece in text.split("<")[1:]]
        assert "http://" not in text
        assert "https://" not in text
    with open_store(tmp_path / "store.db") as store:
        assert Site(store, Library(tmp_path / "skills"), tmp_path / "spool")._templates.autoescape is True
