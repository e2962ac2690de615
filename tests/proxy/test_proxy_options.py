import pytest
from mitmproxy import exceptions
from mitmproxy.test import taddons

from metaclaw_core.proxy import options
from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.settings import leaves


@pytest.fixture
def context():
    with taddons.context() as tctx:
        addon = MetaClaw(worker=False)
        tctx.master.addons.add(addon)
        yield tctx, addon


async def test_every_setting_is_an_option_and_unset_ones_leave_the_file_alone(context):
    tctx, _ = context
    assert all(getattr(tctx.options, "metaclaw_" + "_".join(path)) is None for path in leaves())
    assert options.layer(tctx.options) == {}
    assert options.environment(tctx.options) == {}


async def test_options_are_nested_and_typed_as_yaml(context):
    tctx, addon = context
    tctx.configure(addon, metaclaw_top_k="3", metaclaw_hosts="[a.test, b.test]", metaclaw_llm_api_key="", metaclaw_skills_enabled="false")
    assert options.layer(tctx.options) == {
        "skills": {"top_k": 3, "enabled": False},
        "proxy": {"hosts": ["a.test", "b.test"]},
        "llm": {"api_key": ""},
    }
    assert addon.settings is not None
    assert addon.settings.skills.top_k == 3
    assert addon.settings.proxy.hosts == ("a.test", "b.test")
    assert options.environment(tctx.options) == {
        "METACLAW_SKILLS_TOP_K": "3",
        "METACLAW_PROXY_HOSTS": "[a.test, b.test]",
        "METACLAW_LLM_API_KEY": "",
        "METACLAW_SKILLS_ENABLED": "false",
    }


async def test_a_value_that_becomes_bad_is_refused_and_the_last_good_one_stays(context):
    tctx, addon = context
    tctx.configure(addon, metaclaw_top_k="3")
    with pytest.raises(exceptions.OptionsError, match=r"metaclaw: skills\.top_k = 'many' is not allowed"):
        tctx.configure(addon, metaclaw_top_k="many")
    assert addon.settings is not None
    assert addon.settings.skills.top_k == 3
    with pytest.raises(exceptions.OptionsError, match=r"skills\.top_k"):
        tctx.configure(addon, metaclaw_top_k="[1, ")  # not even YAML


async def test_unknown_options_of_ours_are_named_with_their_nearest(context):
    tctx, _ = context
    tctx.options.set("metaclaw_tok_k=3", "metaclaw_zzzzz=1", "someone_elses=2", defer=True)
    first, second = options.unknown(tctx.options)
    assert first == "metaclaw_tok_k=3 is not a known option. Did you mean metaclaw_top_k?"
    assert second.startswith("metaclaw_zzzzz=1 is not a known option. There are metaclaw_")
