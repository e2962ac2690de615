"""One key changes, every other byte stays."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.configfile import set_value, unset
from metaclaw_core.errors import ConfigError

FILE = """\
# mine
mode: skills_only   # for now

llm:
    provider: kimi   # the good one
    api_key: 'sk-1'

# where it listens
proxy:
    port: 30000 # p
    hosts:
        - a.example  # first
        - b.example
    # the end of proxy

skills: {top_k: 3, enabled: true}
store:
rl:
  model: |
    long
    name
  batch_size: 8"""


def test_a_value_is_replaced_and_its_comment_stays():
    assert set_value(FILE, ("proxy", "port"), 31000) == FILE.replace("30000 # p", "31000 # p")
    assert set_value(FILE, ("mode",), "rl") == FILE.replace("skills_only   # for now", "rl   # for now")
    assert set_value(FILE, ("llm", "api_key"), "sk-2") == FILE.replace("'sk-1'", "sk-2")


def test_a_new_key_goes_to_the_end_of_its_section_not_below_the_next_comment():
    assert set_value(FILE, ("llm", "model_id"), "k2") == FILE.replace("'sk-1'\n", "'sk-1'\n    model_id: k2\n")


def test_a_new_section_goes_to_the_end_of_the_file():
    assert set_value(FILE, ("opd", "enabled"), True) == FILE + "\nopd:\n  enabled: true\n"


def test_an_empty_file_and_one_of_comments_only_take_a_first_key():
    assert set_value("", ("proxy", "port"), 1) == "proxy:\n  port: 1\n"
    assert set_value("# nothing yet", ("mode",), "rl") == "# nothing yet\nmode: rl\n"


def test_lists_block_texts_and_braces_are_replaced_whole():
    assert yaml.safe_load(set_value(FILE, ("proxy", "hosts"), ["c"]))["proxy"]["hosts"] == ["c"]
    assert "# the end of proxy" in set_value(FILE, ("proxy", "hosts"), [])
    assert set_value(FILE, ("skills", "top_k"), 6) == FILE.replace("top_k: 3", "top_k: 6")
    assert "skills: {top_k: 3, enabled: true, dir: /x}" in set_value(FILE, ("skills", "dir"), "/x")
    changed = yaml.safe_load(set_value(FILE, ("rl", "model"), "short"))
    assert changed["rl"] == {"model": "short", "batch_size": 8}


def test_a_section_without_a_value_gets_one():
    assert set_value("store:\nmode: rl\n", ("store", "url"), "x") == "store: {url: x}\nmode: rl\n"


def test_a_key_is_taken_out_and_the_comments_around_it_stay():
    assert unset(FILE, ("llm", "provider")) == FILE.replace("    provider: kimi   # the good one\n", "")
    assert unset(FILE, ("rl", "model")) == FILE.replace("  model: |\n    long\n    name\n", "")
    assert "skills: {enabled: true}" in unset(FILE, ("skills", "top_k"))
    assert "# the end of proxy" in unset(FILE, ("proxy", "hosts"))


def test_the_last_key_takes_its_section_along():
    assert unset("a: 1\nllm:\n  provider: kimi\n# b\nb: 2\n", ("llm", "provider")) == "a: 1\n# b\nb: 2\n"
    assert unset("llm:\n  provider: kimi\n", ("llm", "provider")) == ""


def test_a_key_that_is_not_there_cannot_be_taken_out():
    with pytest.raises(KeyError):
        unset(FILE, ("llm", "model_id"))


def test_what_cannot_be_proven_is_refused_and_a_secret_is_not_shown():
    shared = "llm: &x {api_key: a}\nother: *x\n"
    with pytest.raises(ConfigError, match=r"set llm\.api_key \(to \*\*\*\) by hand"):
        set_value(shared, ("llm", "api_key"), "sk-secret")


def test_the_ends_of_lines_stay_what_they_are():
    assert set_value("mode: rl # x\r\na: 1\r\n", ("mode",), "skills_only") == "mode: skills_only # x\r\na: 1\r\n"


KEYS = st.sampled_from([("mode",), ("llm", "provider"), ("llm", "model_id"), ("proxy", "port"), ("rl", "model"), ("store", "url")])
VALUES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    st.integers(),
    st.booleans(),
    st.none(),
    st.lists(st.sampled_from(["a", "b: c", "#", "-", "[x"]), max_size=3),
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=6), st.data())
def test_any_sequence_of_changes_gives_the_values_asked_for_and_keeps_every_comment(changes, data):
    text, wanted = FILE, yaml.safe_load(FILE)
    for (*section, name), value in changes:
        text = set_value(text, (*section, name), value)
        target = wanted
        for part in section:
            target[part] = target[part] or {}
            target = target[part]
        target[name] = value
        assert yaml.safe_load(text) == wanted
    kept = [line.strip() for line in FILE.splitlines() if line.lstrip().startswith("#")]
    assert [line.strip() for line in text.splitlines() if line.strip() in kept] == kept
    if changes:
        (*section, name), _ = data.draw(st.sampled_from(changes))
        text = unset(text, (*section, name))
        assert [line.strip() for line in text.splitlines() if line.strip() in kept] == kept
