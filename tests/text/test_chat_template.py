"""A chat template gives what transformers makes of it, and whatever it does wrong is one clear error."""

import copy
import json
import re
from datetime import datetime

import pytest

from trimode.errors import ChatTemplateError, PromptError
from trimode.text import render_chat, validate_messages

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>&'\"</b>\n {{ 7 * 7 }} {% x %}"}],
    [{"role": "user", "content": "日本"}, {"role": "assistant", "content": " a "}, {"role": "user", "content": ""}],
]

TEMPLATES = {
    "blocks and loop controls": """
{%- for message in messages %}
    {%- if message.role == "system" %}
        {%- continue %}
    {%- endif %}
    {% if loop.index > 2 %}
    {% break %}
    {% endif %}
[{{ message['role'] | upper }}] {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[ASSISTANT]
{% endif %}
""",
    "namespaces, macros and json": """
{%- set ns = namespace(system='', count=0) -%}
{%- macro show(m) -%}<{{ m.role }}>{{ m | tojson }}{%- endmacro -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- else -%}
{%- set ns.count = ns.count + 1 -%}{{ show(m) }}{%- endif -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}|{{ ns.count }}|{{ messages[0] | tojson(indent=2) }}{{ dict(a=1) }}
""",
    "tools and undefined names": """
{%- if tools is not none -%}TOOLS{{ tools | tojson }}{%- endif -%}
{%- if documents is defined and documents -%}DOCS{%- endif -%}
{{ nothing }}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor -%}
""",
}


def refused(template, messages=CHATS[0], **variables):
    with pytest.raises(ChatTemplateError) as caught:
        render_chat(template, messages, **variables)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_smollm_prompts_are_those_of_transformers(smollm, smollm_oracle, chat, generation):
    expected = smollm_oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    rendered = render_chat(
        smollm.chat_template,
        chat,
        add_generation_prompt=generation,
        bos_token=smollm.bos_token,
        eos_token=smollm.eos_token,
    )
    assert rendered == expected
    assert (
        smollm.encode(rendered)
        == smollm_oracle.apply_chat_template(chat, add_generation_prompt=generation)["input_ids"]
    )


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "tools": [{"name": "f<>"}]}])
def test_other_templates_give_what_transformers_makes_of_them(smollm_oracle, chat, name, variables):
    expected = smollm_oracle.apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **variables
    )
    tokens = {"bos_token": smollm_oracle.bos_token, "eos_token": smollm_oracle.eos_token}
    assert render_chat(TEMPLATES[name], chat, **tokens, **variables) == expected


def test_tokens_that_are_not_there_print_nothing():
    assert render_chat("[{{ bos_token }}{{ eos_token }}]", CHATS[0]) == "[]"


def test_dates_are_those_of_today():
    assert render_chat("{{ strftime_now('%Y') }}", CHATS[0]) == str(datetime.now().year)


def test_a_template_that_refuses_says_why():
    said = refused("{{ raise_exception('roles must alternate\nuser/assistant') }}")
    assert said == "The chat template refuses these messages: roles must alternate user/assistant"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].absent.deeper }}", "line 1"),
        ("x\n{{ absent.deeper }}", r"line 2.*'absent' is undefined"),
        ("{% for m in messages %}", "not valid"),
        ("{{ 1 | no_such_filter }}", "no_such_filter"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages['x' * 3 + 1] }}", "TypeError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{% include 'other' %}", "failed"),
        ("{% for i in range(10**12) %}x{% endfor %}", "OverflowError.*[Rr]ange too big"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template, said):
    assert re.search(said, refused(template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '{0.__class__.__mro__}'.format(messages).x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_change_what_it_sees(template):
    chat = copy.deepcopy(CHATS[0])
    refused(template, chat)
    assert chat == CHATS[0]


def test_objects_in_messages_are_refused_before_a_template_sees_them():
    class Rich:
        def save(self):
            raise AssertionError("a template called this")

    with pytest.raises(PromptError, match="message 1: image holds a Rich"):
        render_chat("{{ messages[1].image.save() }}", [CHATS[0][0], {"role": "user", "content": "", "image": Rich()}])


def test_other_keys_of_a_message_reach_the_template():
    call = [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}]
    chat = [{"role": "assistant", "content": "", "tool_calls": call}]
    assert json.loads(render_chat("{{ messages[0].tool_calls | tojson }}", chat)) == call


def test_a_content_of_text_parts_is_joined():
    chat = [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "role": "user"}]
    assert validate_messages(chat) == [{"role": "user", "content": "ab"}]
    assert isinstance(chat[0]["content"], list)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "must be a list .* got str"),
        ({"role": "user", "content": "Hi"}, "must be a list .* got dict"),
        (None, "must be a list .* got NoneType"),
        ([], "empty"),
        (["Hi"], "message 0 must be a mapping .* got str"),
        ([CHATS[0][0], {"content": "x"}], 'message 1 has no "role"'),
        ([CHATS[0][0], {"role": "user"}], 'message 1 has no "content"'),
        ([{"role": 3, "content": "x"}], "message 0: role must be a string; got int"),
        (
            [CHATS[0][0], {"role": "wizard", "content": "x"}],
            "message 1: there is no role 'wizard'. Use one of system, dev",
        ),
        ([{"role": "asistant", "content": "x"}], "no role 'asistant'. Did you mean 'assistant'"),
        ([{"role": "User", "content": "x"}], "no role 'User'. Did you mean 'user'"),
        ([{"role": "user", "content": None}], "message 0: content must be a string .* got NoneType"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "message 0: content must be .* got dict"),
        ([{"role": "user", "content": ["x"]}], "message 0: part 0 .* got 'str'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "u"}]}],
            "message 0: part 1 .* got 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: part 0"),
    ],
)
def test_a_faulty_message_is_named_by_its_index(messages, said):
    with pytest.raises(PromptError, match=said):
        validate_messages(messages)
    with pytest.raises(PromptError, match=said):
        render_chat("", messages)
