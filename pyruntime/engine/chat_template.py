"""A checkpoint's chat template, run in a sandbox that cannot hang, fill the memory or reach Python's internals.

A template comes with the weights and is not trusted. jinja2's immutable sandbox keeps it from attributes and from
changing what it is given; the limits on time and size are added here, in the compiled template itself. They stop loops,
recursion and every way to blow up a text that is known to us. They are checks inside one process, not a wall around it.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pyruntime.errors import CheckpointError, UsageError

MAX_TEMPLATE_CHARS: Final = 2**20
MAX_CHARS: Final = 4 * 2**20
MAX_SECONDS: Final = 1.0
# characters and list entries a template may write in all, what it throws away included
_MAX_WORK: Final = 16 * MAX_CHARS
_MAX_INT_BITS: Final = 4096
_MAX_LIST: Final = 100_000
# a width of five digits, or one taken from an argument, asks for padding and not for text
_WIDE_FORMAT: Final = re.compile(r"\d{5}|\*|:[^}]*\{")
# filters that hand a list on without writing it out as text
_LIST_FILTERS: Final = frozenset(
    "length count first last list map select selectattr reject rejectattr items dictsort sort unique reverse groupby "
    "batch slice min max sum default d attr".split()
)
_BUDGET: Final = "pyruntime_budget"


class ChatTemplate:
    """A compiled template. Raises CheckpointError when the text cannot be parsed."""

    def __init__(self, text: str) -> None:
        try:
            self._template = _Environment().from_string(text)
        except (TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(
                "CHAT_TEMPLATE", f"the chat template cannot be parsed: {error}; fix it or bring another"
            ) from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special_tokens: Mapping[str, str]
    ) -> str:
        """The text for `messages`; `special_tokens` ("bos_token": "<s>") are variables of the template.

        Raises UsageError when the messages are no list of JSON objects, when the template refuses them, and when it
        passes a limit.
        """
        values = {
            **special_tokens,
            "messages": _plain(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _BUDGET: _Budget(),
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > MAX_CHARS:
                    raise _LimitError(f"its text is longer than {MAX_CHARS} characters")
                pieces.append(piece)
        except Exception as error:
            # whatever a hostile template provokes ends its own request and nothing else
            raise UsageError(
                "CHAT_TEMPLATE", f"the chat template of this model does not accept these messages: {str(error)[:300]}"
            ) from error
        return "".join(pieces)


class _LimitError(TemplateError):
    """A template that is stopped."""


class _Budget:
    """Time and work left for one rendering; the sandbox hides underscored names from the template."""

    __slots__ = ("_deadline", "_work")

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._work = 0


def _spend(context: Context, work: int) -> None:
    # `parent` holds what was given to render(): a template's own variables cannot shadow it
    budget = context.parent[_BUDGET]
    budget._work += work
    if budget._work > _MAX_WORK:
        raise _LimitError(f"it writes more than {_MAX_WORK} characters")
    if time.monotonic() > budget._deadline:
        raise _LimitError(f"it runs longer than {MAX_SECONDS:g} s")


def _size(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _check_text_size(values: Iterable[object]) -> int:
    """About how many characters `values` have when written out; lists inside lists count as often as they occur."""
    stack, total = list(values), 0
    while stack:
        value = stack.pop()
        # an entry of a list takes three characters at least: itself, a comma and a space
        total += 3
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
        if total + 3 * len(stack) > MAX_CHARS:
            raise _LimitError(f"a value longer than {MAX_CHARS} characters")
    return total


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    _spend(context, _check_text_size((value,)))
    return value


class _Instrument(NodeTransformer):
    """Puts a call to `tick` into every body that can run again, and turns `a ~ b` into a call that is counted."""

    def _visit_body(self, node: Any) -> Any:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(literal)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    # names that jinja2 looks up
    visit_For = _visit_body
    visit_Macro = _visit_body
    visit_CallBlock = _visit_body

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join_text"), list(node.nodes), [], None, None).set_lineno(
            node.lineno
        )


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the model's own turns for training; the text inside is kept as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2 as an instance's

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with transformers' settings and names for chat templates, and with counted work."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_finalize
        )
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        return tree

    @pass_context
    def tick(self, context: Context, literal: int) -> None:
        """Counts one turn of a loop or one call of a macro that writes `literal` characters of its own."""
        _spend(context, 1 + literal)

    @pass_context
    def join_text(self, context: Context, *parts: Any) -> str:
        """`a ~ b`: the parts as text, one behind the other."""
        _spend(context, _check_text_size(parts))
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_INT_BITS:
                raise _LimitError("a number of thousands of digits")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_text_size((right,))
        result = super().call_binop(context, operator, left, right)
        _spend(context, _size(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        _check_format(value.__self__)

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_text_size((*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return limited

    # the first two names are positional-only so that a template may pass keywords of the same name
    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            _check_growth(getattr(obj, "__name__", ""), owner, args)
        result = super().call(context, obj, *args, **kwargs)
        _spend(context, _size(result))
        return result


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_INT_BITS:
            raise _LimitError("a number of thousands of digits")
        return
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            limit = MAX_CHARS if isinstance(sequence, str) else _MAX_LIST
            if len(sequence) * count > limit:
                raise _LimitError(f"a sequence repeated to more than {limit} entries")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise _LimitError("a format with a width of five digits")


def _check_growth(name: str, owner: object, args: Sequence[Any]) -> None:
    """Refuses the calls that make a text much larger than what goes into them, before they run."""
    if any(isinstance(arg, int) and abs(arg) > MAX_CHARS for arg in args):
        raise _LimitError(f"a width above {MAX_CHARS}")
    if not isinstance(owner, str):
        return
    size = 0
    if name == "format":
        _check_format(owner)
    elif name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        size = len(owner) + owner.count(args[0]) * len(args[1])
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        size = len(owner) * len(args[0]) + _check_text_size(args[:1])
    if size > MAX_CHARS:
        raise _LimitError(f"a text longer than {MAX_CHARS} characters")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # filters are called by the compiled template directly, without Environment.call
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # what jinja2 passes to some filters ahead of the value is none of these types
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, int, list, tuple, dict))]
        if name == "join" and len(values) >= 2:
            _check_growth(name, values[1], values[:1])
        elif values:
            _check_growth(name, values[0], values[1:])
        if name not in _LIST_FILTERS:
            _check_text_size(values)
        result = function(*args, **kwargs)
        if isinstance(result, str) and len(result) > MAX_CHARS:
            raise _LimitError(f"a text longer than {MAX_CHARS} characters")
        return result

    return checked


def _plain(messages: Sequence[Mapping[str, Any]]) -> Any:
    """The messages as fresh dicts, lists and texts: no object with attributes reaches the template."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise UsageError("MESSAGES", f"messages is {type(messages).__name__}; expected a list of objects")
    try:
        plain = json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("MESSAGES", f"messages are no JSON data: {str(error)[:200]}") from error
    if not plain:
        raise UsageError("MESSAGES", "messages is empty; expected at least one")
    for i, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError("MESSAGES", f"messages[{i}] has no role; expected an object with role and content")
    return plain


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a model was not trained on
    if indent is not None and not 0 <= indent <= 16:
        raise _LimitError("an indent above 16")
    _check_text_size((value,))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    _check_format(form)
    # local time, as in transformers: a template prints today's date with it
    return datetime.now().strftime(form)
