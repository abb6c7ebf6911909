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
_MANY = "{% for i in range(9999) %}{% for j in range(9999) %}"
_SHARED = (
  "{{% set n = namespace(x={0}, y={0}) %}}{{% for i in range(60) %}}"
  "{{% set n.x = {1} %}}{{% set n.y = {2} %}}{{% endfor %}}"
)
_TWICE = _SHARED.format("[1]", "[n.x, n.x]", "[n.y, n.y]")
_TUPLES = _SHARED.format("(1,)", "(n.x, n.x)", "(n.y, n.y)")
_USES = [
  "{{ n.x == n.y }}",
  "{{ n.x != n.y }}",
  "{{ n.x < n.y }}",
  "{{ 1 if n.x >= n.y else 2 }}",
  "{% if n.x == n.y %}{% endif %}",
  "{% for z in [1] if n.x == n.y %}{% endfor %}",
  "{% for z in n.x == n.y %}{% endfor %}",
  "{% set z = n.x == n.y %}",
  "{{ [n.x == n.y] }}",
  "{{ {1: n.x == n.y} }}",
  "{% macro f(z=n.x == n.y) %}{% endmacro %}{{ f() }}",
  "{{ n.x in [n.y] }}",
  "{{ n.x not in [n.y] }}",
  "{{ n.x in ([n.y]|map('list')) }}",
  "{{ n.x in {'a': n.y}.values() }}",
  "{{ {'a': n.x}.items() == {'a': n.y}.items() }}",
  "{{ {'a': n.x} == {'a': n.y} }}",
  "{{ n.x is eq(n.y) }}",
  "{{ n.x is equalto n.y }}",
  "{{ n.x is ne n.y }}",
  "{{ n.x is lt n.y }}",
  "{{ n.x is in [n.y] }}",
  "{{ [n.x]|select('equalto', n.y)|list }}",
  "{{ [n.x]|reject('in', [n.y])|list }}",
  "{{ [{'a': n.x}]|selectattr('a', 'equalto', n.y)|list }}",
  "{{ [n.y].count(n.x) }}",
  "{{ [n.y].index(n.x) }}",
  "{{ [n.x, n.y]|sort }}",
  "{{ [n.x, n.y]|max }}",
  "{{ [n.x, n.y]|unique|list }}",
  "{{ [{'a': n.x}, {'a': n.y}]|groupby('a') }}",
  "{{ {'a': n.x, 'b': n.y}|dictsort(by='value') }}",
  "{% for i in [1, 2] %}{{ loop.changed(n.x if i == 1 else n.y) }}{% endfor %}",
  "{{ n.x|string }}",
  "{{ n.x ~ '' }}",
  "{{ n.x|upper }}",
  "{{ n.x|format(1) }}",
  "{{ '%s' % (n.x,) }}",
  "{{ '{}'.format(n.x) }}",
  "{{ [n.x]|join }}",
  "{{ raise_exception(n.x) }}",
  "{{ n.x + n.y }}",
  "{{ n.x - n.y }}",
  # A namespace is spelled with what it holds.
  "{{ n }}",
  "{{ n ~ 1 }}",
]
_HASHES = [
  "{{ {n.x: 1} }}",
  "{{ {1: 2}[n.x] }}",
  "{{ {1: 2}.get(n.x) }}",
  "{{ n.x in {1: 2} }}",
  "{{ dict([(n.x, 1)]) }}",
  "{{ [n.x, n.y]|unique|list }}",
  "{% set m = namespace([[n.x, 1]]) %}",
  *_USES[:4],
]
_CENTRED = "('a'|center(99999)|replace(' ', 'bbbb'))"
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
    "{% for x in [0] recursive %}{% if loop.depth == 1 %}{% set y ="
    " loop('x'|center(9999)) %}{% endif %}"
    f"{'{% set a = x %}' * 999}{{% endfor %}}",
    *(
      f"{{% for x in [0] {rest}{{% endfor %}}"
      for rest in ("if x recursive %}", "recursive %}{% else %}x")
    ),
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
    # One list twice, or a tuple: whatever compares, hashes or spells it.
    *(f"{_TWICE}{use}" for use in _USES),
    *(f"{_TUPLES}{use}" for use in _HASHES),
    # A tuple so deep that hashing it would end the process.
    "{% set n = namespace(x=()) %}" + _MANY + "{% set n.x = (n.x,) %}"
    "{% endfor %}{% endfor %}{{ {n.x: 1} }}",
    # Much work in one body, and in one that is called.
    f"{_MANY}{'{% set a = 1 %}' * 4000}{_END}{_END}",
    f"{{% macro f() %}}{'{% set a = 1 %}' * 4000}{{% endmacro %}}"
    f"{_MANY}{{% set y = f() %}}{_END}{_END}",
    f"{_LONG}{_MANY}{{% set y = n.x[1:] %}}{_END}{_END}",
    f"{_LONG}{_MANY}{{% set y = n.x is string %}}{_END}{_END}",
    f"{_LONG}{_MANY}{{% set y = n.x|float %}}{_END}{_END}",
    f"{_LONG}{_MANY}{{% set y = 'b' in n.x %}}{_END}{_END}",
    f"{_MANY}{{{{ 5|round(-99999) }}}}{_END}{_END}",
    "{{ range(9999)|sort(attribute='" + "real." * 9000 + "real') }}",
    "{{ range(9999)|sort(attribute='" + "real," * 9000 + "real')|list }}",
    "{{ [[1]]|sum(start=[]) }}",
    # Formats whose width is told elsewhere.
    "{{ '{0:{1}}'.format(1, '999999999') }}",
    "{{ '{0:{1}{1}}'.format(1, '99999') }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': 999999999}) }}",
    "{{ '{0:{1[0]}}'.format(1, [999999999]) }}",
    "{{ '%1000000000d' is odd }}",
    "{{ '%1000000000d' is even }}",
    "{{ '%1000000000d' is divisibleby 3 }}",
    "{{ ['%1000000000d']|select('odd')|list }}",
    f"{_LONG}{{{{ range(9999)|list|tojson(indent=n.x) }}}}",
    f"{_LONG}{{{{ range(9999)|list|tojson(separators=(n.x, n.x)) }}}}",
    "{% set n = namespace(x=1) %}{% for i in range(300) %}"
    "{% set n.x = [n.x, 1, 2] %}{% endfor %}{{ n.x|tojson(indent=99999) }}",
    # A budget is not filled up again.
    f"{_LONG}{_MANY}{{{{ ''|_weighed(-9999999) }}}}{{% set y = n.x ~ n.x %}}"
    f"{_END}{_END}",
    f"{_LONG}{_MANY}{{{{ ['']|map('_weighed', -9999999)|list }}}}"
    f"{{% set y = n.x ~ n.x %}}{_END}{_END}",
    # What is evaluated while it compiles.
    "{{ " + " ~ ".join([_CENTRED] * 900) + " }}",
    "{{ [" + ",".join([_CENTRED] * 900) + "] }}",
    # What no Python can be made of.
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 5000 + " }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    # Filters that no chat template has a use for.
    *(
      f"{{{{ 'x'|{name} }}}}"
      for name in "pprint random striptags urlize urlencode wordwrap".split()
    ),
    "{{ ('<!---->'|safe).striptags() }}",
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


def test_a_number_beyond_all_numbers_is_a_fault():
  with pytest.raises(chat_template_lib.FAULTS, match="inf"):
    _render("{{ messages == 1e999 }}")


def test_the_size_of_a_template_is_bounded():
  with pytest.raises(errors.UserError, match="more than 65536"):
    _render("x" * 65_537)
  assert _render("x" * 65_536) == "x" * 65_536


def test_what_is_compared_counts_once_for_each_place_it_stands_in():
  # 2**12 lists of one number: within the budget; 2**17 are beyond it.
  text = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(N) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
    "{{ n.x == n.y }}"
  )
  assert _render(text.replace("N", "12")) == "True"
  with pytest.raises(chat_template_lib.FAULTS, match="runs too long"):
    _render(text.replace("N", "17"))


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("{{ 1 < 2 <= 2 != 3 }}", "True"),
    ("{{ 'ab' in 'cabd' and 'x' not in ['y'] }}", "True"),
    ("{{ {'a': 1, 2: 'b'}[2] ~ {(1, 2): 'c'}[(1, 2)] }}", "bc"),
    ("{{ 'abcdef'[1:4] ~ [1, 2, 3][::-1] ~ messages[1:] }}",
     "bcd[3, 2, 1][]"),
    ("{{ nothing == 'x' }}{{ nothing is eq('x') }}", "FalseFalse"),
    ("{{ messages[0] == messages[-1] }}", "True"),
    ("{{ [3, 1, 2]|sort|join(',') }}{{ [1, 1]|unique|list|length }}",
     "1,2,31"),
    ("{{ [1, 2, 3]|select('gt', 1)|map('string')|join('+') }}", "2+3"),
    ("{{ [1, 2]|sum }}{{ [{'n': 3}]|sum(attribute='n') }}", "33"),
    ("{{ 3 is odd and 4 is even and 6 is divisibleby 3 }}", "True"),
    ("{{ '%5.2f|%-3s|%s' % (1.5, 'a', none) }}", " 1.50|a  |None"),
    ("{{ '{:>4}|{x}'.format(7, x='y') }}", "   7|y"),
    ("{{ {'b': [1, {'a': none}]}|tojson }}", '{"b": [1, {"a": null}]}'),
    ("{{ {'b': [1]}|tojson(indent=2) }}", '{\n  "b": [\n    1\n  ]\n}'),
    ("{{ 'é'|tojson(ensure_ascii=true) }}", '"\\u00e9"'),
    ("{% call(x) f() %}{{ x }}{% endcall %}", None),
    ("{% block b %}{{ 1 + 1 }}{% endblock %}{{ self.b() }}", "22"),
    ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
    ("{% set x %}a{{ 1 }}{% endset %}{{ x }}", "a1"),
    ("{{ 7 - 2 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -3 }}", "533.5-3"),
    ("{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}{% endfor %}", "ab"),
    ("{{ messages|map(attribute='role')|first }}", "user"),
    ("{{ ['a', 'b']|reverse|list }}{{ 'ab'|reverse }}", "['b', 'a']ba"),
  ],
)  # fmt: skip
def test_what_is_charged_for_gives_what_jinja_gives(text, expected):
  if expected is None:
    text = "{% macro f() %}<{{ caller(1) }}>{% endmacro %}" + text
    expected = "<1>"
  assert _render(text) == expected
