"""Chat templates: the text of transformers, and what a hostile one can do."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest

from pyruntime.engine.chat_template import ChatTemplate
from pyruntime.errors import CheckpointError, UsageError

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": " Hi <s> 🦙 "},
    {"role": "assistant", "content": "the cat", "parts": [1, None, 2.5]},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str, messages: Any = CHAT) -> str:
    return ChatTemplate(template).render(messages, True, SPECIAL)


TEMPLATES = [
    "{%- for m in messages %}\n  {%- if m.role == 'user' %}\n    {{- 'U: ' ~ m.content ~ loop.index }}\n"
    "  {%- endif %}\n{%- endfor %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ tools is none }}{{ documents is none }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ns.n}}",
    "{{ messages | map(attribute='role') | join(', ') }} "
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% macro turn(m) %}<{{ m.role }}>{{ caller() if caller else '' }}{{ m['content'].strip().split()[0] }}"
    "{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "{{ messages[::-1] | first }} {{ 'a%s' % 3 }} {{ '{}-{x}'.format(1, x=2) }} {{ 7 // 2 * 3 ** 2 }} {{ undefined }}",
    "{{ messages[0]['content'].replace('Hi', 'Ho') | upper }} {{ '-' * 5 }} {{ messages | tojson(indent=2) }}",
    "{% if messages[0]['role'] not in ['user', 'system'] %}{{ raise_exception('x') }}{% endif %}"
    "{{ strftime_now('%Y') }}",
    "{{ dict(a=1, **messages[0]) | items | list }} {{ {'b': 1}.get('c', 2) }} {{ messages[0].items() | list }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (theirs,), _ = render_jinja_template([CHAT], chat_template=template, add_generation_prompt=True, **SPECIAL)
    assert render(template) == theirs


def test_a_chat_as_long_as_allowed_is_not_taken_for_an_attack() -> None:
    messages = [{"role": "user", "content": "x" * 1000}] * 4000
    template = "{% for m in messages %}{{ '[' ~ m.role ~ ']' + m.content | trim }}{% endfor %}"
    assert len(render(template, messages)) == 4000 * 1006
    with pytest.raises(UsageError, match="longer than 4194304 characters"):
        render(template, messages + messages)


def test_the_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(UsageError, match="unsafe"):
        render("{{ messages[0].update(role='x') }}", messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_syntax_error_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="cannot be parsed"):
        ChatTemplate("{% if %}")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "endless loop": LOOP.replace("BODY", ""),
    "endless loop without a call": (
        "{% set r = range(999) | list %}{% for i in r %}{% for j in r %}{% for k in r %}{% for l in r %}"
        "{% endfor %}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "nested lists as text": GROW.replace("START", "1").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | string | length }}",
    "nested lists in upper case": (
        "{% set ns = namespace(x=1) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x | upper | length }}"
    ),
    "endless output": LOOP.replace("BODY", "x" * 1000),
    "hidden output": "{% set y %}" + LOOP.replace("BODY", "{{ 'x' * 4000000 }}") + "{% endset %}",
    "recursion": "{% macro f(n) %}{{ f(n-1) }}{% endmacro %}{{ f(9) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "string product": "{{ 'a' * 10000000000 }}",
    "list product": "{{ [1] * 10000000000 }}",
    "nested lists": "{{ [[1] * 90000] * 90000 }}",
    "nested lists as JSON": "{{ ([[1] * 90000] * 90000) | tojson }}",
    "doubling with ~": GROW.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
    "doubling with +": GROW.replace("START", "'a'").replace("STEP", "ns.x + ns.x"),
    "doubling lists": GROW.replace("START", "1").replace("STEP", "[ns.x, ns.x]"),
    "replace method": GROW.replace("START", "'a'").replace("STEP", "ns.x.replace('a', 'aaaaaaaaa')"),
    "replace filter": GROW.replace("START", "'a'").replace("STEP", "ns.x | replace('a', 'aaaaaaaaa')"),
    "join": GROW.replace("START", "'a'").replace("STEP", "[ns.x, ns.x] | join(ns.x)"),
    "squaring": GROW.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    "power": "{{ 9 ** 999999999 }}",
    "powers": GROW.replace("START", "3").replace("STEP", "ns.x ** 9"),
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "old format": "{{ '%10000000000d' % 1 }}",
    "old format, width argument": "{{ '%*d' % (10000000000, 1) }}",
    "new format": "{{ '{:10000000000}'.format(1) }}",
    "new format, width argument": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format of a nested list": GROW.replace("START", "1")
    .replace("STEP", "[ns.x, ns.x]")
    .replace("{{ ns.x }}", "{{ '{}'.format(ns.x) }}"),
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "format attributes": "{{ '{0.__class__}'.format(1) }}{{ (1).__class__.x.y }}",
    "the budget": "{% set pyruntime_budget = 1 %}" + LOOP.replace("BODY", ""),
    "include": "{% include '/etc/passwd' %}",
    "an exception of the template": "{{ raise_exception('only user and assistant') }}",
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_hostile_template_is_stopped(what: str) -> None:
    template = ChatTemplate(HOSTILE[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(UsageError, match="chat template of this model"):
        template.render(CHAT, True, SPECIAL)
    # one second is allowed; the rest is for slow and busy machines
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
