"""What a template of somebody else's may do, and how it is stopped."""

import time

import pytest

from cacovid_jax import errors
from cacovid_jax.data import chat_template as chat_template_lib

MESSAGES = [{"role": "user", "content": "Why?"}]


def _render(text, messages=MESSAGES, **variables):
  return chat_template_lib.Template(text, "DIR").render(messages, **variables)


@pytest.mark.parametrize(
  "text",
  [
    # Out of the sandbox.
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ range.__globals__.os }}",
    "{{ (messages|map).gi_frame.f_globals }}",
    "{{ messages|map(attribute='__class__')|list|first|attr('mro')() }}",
    "{{ ''|attr('__class__')|attr('mro') }}",
    "{{ '{0.__class__.mro}'.format('') }}",
    "{{ self.__init__.__globals__ }}",
    # Other files.
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
    "{{ open('/etc/passwd') }}",
    "{{ lipsum() }}",
    # What it is given stays as it is.
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    # Its own errors.
    "{{ raise_exception('no') }}",
    "{{ undefined.attribute }}",
    "{{ 1 / 0 }}",
    "{{ messages|nosuch }}",
  ],
)
def test_nothing_outside_is_within_reach(text):
  with pytest.raises((errors.UserError, *chat_template_lib.FAULTS)):
    _render(text)
  assert MESSAGES == [{"role": "user", "content": "Why?"}]


_NEST = "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
_LOOP = "{% for i in range(9999) %}{% for j in range(9999) %}"
_END = "{% endfor %}"
# 200 000 characters.
_LONG = (
  "{% set n = namespace(x='aaaaa'.ljust(50000, 'a')) %}"
  "{% set n.x = n.x ~ n.x ~ n.x ~ n.x %}"
)


@pytest.mark.parametrize(
  "text",
  [
    # Loops, with and without output.
    f"{_LOOP}{_END}{_END}",
    f"{_LOOP}aaaa{_END}{_END}",
    f"{_LOOP}{{% if i == j %}}{{% endif %}}{_END}{_END}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(50) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f() %}" + "x" * 9000 + "{% endmacro %}"
    "{% set y %}{% for i in range(9999) %}{{ f() }}{% endfor %}{% endset %}",
    # Text and numbers that double.
    f"{_NEST}{{% set n.x = n.x + n.x %}}{_END}",
    f"{_NEST}{{% set n.x = n.x ~ n.x %}}{_END}",
    f"{_NEST}{{% set n.x %}}{{{{ n.x }}}}{{{{ n.x }}}}{{% endset %}}{_END}",
    f"{_NEST}{{% set n.x = n.x|replace('a', 'aab') %}}{_END}",
    f"{_NEST}{{% set n.x = n.x|replace('', n.x) %}}{_END}",
    f"{_NEST}{{% set n.x = [n.x, n.x]|join %}}{_END}",
    f"{_NEST}{{% set n.x = [n.x, n.x] %}}{_END}{{{{ n.x }}}}",
    f"{_NEST}{{% set n.x = [n.x, n.x] %}}{_END}{{{{ n.x|tojson }}}}",
    f"{_NEST}{{% set n.x = {{'a': n.x, 'b': n.x}} %}}{_END}{{{{ n.x }}}}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}"
    f"{{% set n.x = n.x * n.x %}}{_END}",
    # One step that asks for much.
    f"{_LONG}{{{{ n.x|replace('', n.x) }}}}",
    f"{_LONG}{{{{ n.x.replace('', n.x) }}}}",
    f"{_LONG}{{{{ n.x|list|join(n.x) }}}}",
    f"{_LONG}{{{{ n.x.join(n.x) }}}}",
    f"{_LONG}{{{{ n.x.translate({{97: n.x}}) }}}}",
    f"{_LONG}{{{{ n.x.replace('a', '\t').expandtabs(99999) }}}}",
    f"{_LONG}{{{{ '%s%s%s' % (n.x, n.x, n.x) }}}}",
    f"{_LONG}{{{{ '{{0}}{{0}}{{0}}{{0}}{{0}}{{0}}{{0}}{{0}}'.format(n.x) }}}}",
    "{{ 'a' * 1000000000 }}",
    "{{ [1] * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a\nb'|indent(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ messages|batch(1000000000, 'x')|list }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{{ range(10000)|join(range(10000)|join('x')) }}",
    "{{ range(10000)|select|join(range(10000)|join('x')) }}",
    "{{ (range(10000)|join('x')).join(range(10000)|map('string')) }}",
  ],
)
def test_nothing_runs_or_grows_without_end(text):
  start = time.process_time()
  with pytest.raises((errors.UserError, *chat_template_lib.FAULTS)):
    _render(text)
  assert time.process_time() - start < 5.0


def test_a_long_conversation_is_within_the_budget():
  text = (
    "{%- for message in messages %}{{ '<' ~ message.role + '>\n' }}"
    "{%- for item in message.content %}{{ item.text | trim }}{% endfor %}\n"
    "{%- endfor %}"
  )
  content = [{"type": "text", "text": "word " * 400}]
  messages = [{"role": "user", "content": content}] * 300
  got = _render(text, messages)
  assert got.count("word") == 300 * 400


@pytest.mark.parametrize(
  "text, expected",
  [
    ("{% for x in 'abc' %}{{ loop.index }}{{ loop.last }} {% endfor %}", None),
    ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{% else %}no{% endfor %}", "13"),
    ("{% for x in [] %}{{ x }}{% else %}no{% endfor %}", "no"),
    ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}"
     "{% endfor %}", "1"),
    ("{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ none }}{% endfor %}",
     "a1None"),
    ("{% set n = namespace(k=0) %}{% for x in 'ab' %}{% set n.k = n.k + 1 %}"
     "{% endfor %}{{ n.k }}", "2"),
    ("{% for x in [[1], [2]] recursive %}{% if x is iterable %}{{ loop(x) }}"
     "{% else %}{{ x }}{% endif %}{% endfor %}", "12"),
    ("{% macro f(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}", "a!"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
     "1"),
    ("{{ messages[0]['content'].split('h')[1] + 'x' * 0 }}", False),
    ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
    ("{{ '%s-%d' % ('a', 3) }} {{ '{}'.format(4) }} {{ 7 % 4 }}", "a-3 4 3"),
    ("{% generation %}answer{% endgeneration %}", "answer"),
    ("{%- if x is defined -%}yes{%- endif -%}  a  {#- b #}", "a"),
    ("{{ undefined }}|{{ none }}|{{ true }}|{{ 1.5 }}", "|None|True|1.5"),
    ("{{ '<b>' | escape }}{{ '&' }}", "&lt;b&gt;&"),
  ],
)  # fmt: skip
def test_what_templates_use_works(text, expected):
  if expected is False:  # Repetition of text is refused, however small.
    with pytest.raises(chat_template_lib.FAULTS):
      _render(text)
    return
  if expected is None:
    expected = "1False 2False 3True "
  assert _render(text) == expected


@pytest.mark.parametrize("text", ["{% for %}", "{{ x", "{% nosuch %}"])
def test_syntax_errors_name_the_file(text):
  with pytest.raises(errors.UserError, match="DIR: .* does not parse"):
    _render(text)


def test_the_size_of_a_template_is_bounded():
  with pytest.raises(errors.UserError, match="more than 65536"):
    _render("x" * 65_537)
  assert _render("x" * 65_536) == "x" * 65_536
