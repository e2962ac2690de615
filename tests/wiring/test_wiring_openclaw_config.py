"""proxy.proxyUrl goes in and out of openclaw.json; everybody else's bytes stay."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json5_texts import objects

from metaclaw_core.errors import ConfigError
from metaclaw_core.wiring.openclaw_config import proxy_of, set_proxy, timeouts_of, unset_proxy

URL = "http://127.0.0.1:30000"
WRITTEN = """{
  // mine
  gateway: {"mode": "local"},
  "models": {'mode': "merge",},
}
"""


def test_it_is_the_first_member_and_nothing_else_changes():
    assert set_proxy(WRITTEN, URL).text == WRITTEN.replace("{\n", '{\n  "proxy": {"proxyUrl": "http://127.0.0.1:30000"},\n', 1)


def test_a_section_that_is_there_gets_one_key():
    text = '{"proxy": {"loopbackMode": "proxy"}}'
    wired = set_proxy(text, URL)
    assert wired.text == '{"proxy": {"proxyUrl": "http://127.0.0.1:30000","loopbackMode": "proxy"}}'
    assert not wired.made_section
    assert unset_proxy(wired.text, URL, made_section=False) == text


@pytest.mark.parametrize("text", ["{}", "{ }", "{\n}\n", '{"proxy": {}}', "{proxy: { /* none */ }}", "{'a': 1}", "\ufeff{a: 1,}", '{\r\n\t"a": 1\r\n}'])
def test_wired_and_undone_a_file_has_the_bytes_it_had(text):
    wired = set_proxy(text, URL)
    assert proxy_of(wired.text) == URL
    assert unset_proxy(wired.text, URL, made_section=wired.made_section) == text


@given(objects(), st.sampled_from([URL, "http://127.0.0.1:1", 'http://x/"\\']))
def test_wired_and_undone_any_file_has_the_bytes_it_had(text, url):
    wired = set_proxy(text, url)
    assert unset_proxy(wired.text, url, made_section=wired.made_section) == text


@given(
    st.dictionaries(st.text(min_size=1).filter(lambda k: k not in ("proxy", "$include")), st.integers() | st.text(), max_size=4),
    st.dictionaries(st.text(min_size=1).filter(lambda k: k not in ("proxyUrl", "$include", "enabled")), st.integers(), max_size=2),
    st.booleans(),
)
def test_what_others_changed_in_between_stays(theirs, in_proxy, last):
    """OpenClaw writes its file anew, with other keys, in another order, our key among them."""
    wired = set_proxy('{"a": 1}', URL)
    proxy = {"proxyUrl": URL, **in_proxy} if not last else {**in_proxy, "proxyUrl": URL}
    rewritten = json.dumps({**theirs, "proxy": proxy} if last else {"proxy": proxy, **theirs}, indent=2)
    undone = json.loads(unset_proxy(rewritten, URL, made_section=wired.made_section))
    assert undone == theirs | ({"proxy": in_proxy} if in_proxy else {})


def test_a_url_that_somebody_else_put_there_is_not_ours_to_remove():
    text = '{"proxy": {"proxyUrl": "http://proxy.corp:3128"}}'
    assert unset_proxy(text, URL, made_section=True) == text


def test_a_comment_in_the_section_we_made_keeps_the_section():
    text = '{"proxy": {/* why */ "proxyUrl": "http://127.0.0.1:30000"}}'
    assert unset_proxy(text, URL, made_section=True) == '{"proxy": {/* why */}}'


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ('{"proxy": {"proxyUrl": "http://me:pw@corp:3128"}}', "openclaw.json already names another proxy (http://***@corp:3128)"),
        ('{"proxy": {"enabled": false}}', "openclaw.json switches OpenClaw's proxy off"),
        ('{"$include": "./more.json"}', "openclaw.json includes other files"),
        ('{"proxy": {}, proxy: {}}', "openclaw.json holds `proxy` twice"),
        ('{"proxy": {proxyUrl: "a", "proxyUrl": "b"}}', "openclaw.json holds proxy.proxyUrl twice"),
        ('{"proxy": "x"}', "openclaw.json has a `proxy` that is no object"),
        ("[]", "openclaw.json holds no object"),
        ('{"a": }', "openclaw.json can't be read (a value is missing in line 1), so it is left alone."),
    ],
)
def test_what_can_not_be_edited_safely_is_refused(text, begins):
    with pytest.raises(ConfigError) as e:
        set_proxy(text, URL)
    assert str(e.value).startswith(begins)


def test_the_time_outs_of_the_providers():
    text = "{models: {providers: {a: {timeoutSeconds: 30, apiKey: 'x'}, b: {timeoutSeconds: '9'}, c: {}}}}"
    assert timeouts_of(text) == {"a": 30.0}
    assert timeouts_of("{") == {}
