"""A plain typed function is a tool: its name, docstring and types become a JSON schema.

The schema of the types is transformers' (`get_json_schema`), as models have seen it in training.
That function wants a docstring in Google style with a text for every parameter; here a docstring
may also describe parameters inline, some or none, and what has no exact schema is refused.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.tools.arguments import JSON_TYPES, convert_floats, find_problem

SECTIONS = re.compile(r"^\s*(Args|Arguments|Returns|Raises|Yields|Examples?):\s*$", re.MULTILINE)
_OPTIONS = "__tool_options__"  # where `tool` notes its arguments, on the function
_NO_TEXT = "-"

_Signature = tuple[str, dict[str, Any], bool]
_known: WeakKeyDictionary[Any, dict[tuple[str, bool], _Signature]] = WeakKeyDictionary()

F = TypeVar("F", bound=Callable[..., Any])


class ToolSchemaError(ConfigError):
    """A function cannot be a tool as it is; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy can call."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of the arguments, an object
    fn: Callable[..., Any]
    is_async: bool = False
    timeout: float | None = None  # seconds; None: the environment's
    output_chars: int | None = None  # what the policy sees at most; None: the environment's
    validate: Callable[[Mapping[str, Any]], str | None] | None = None  # what `check` does not know

    def __post_init__(self) -> None:
        check_limits(f"Tool '{self.name}'", self.timeout, self.output_chars)

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        timeout: float | None = None,
        output_chars: int | None = None,
    ) -> Tool:
        """Make a tool of a function, bound method or callable object.

        Parameters need annotations made of str, int, float, bool, None, Any, Literal, list[...],
        dict[str, ...] and unions of these; one with a default is optional.  The docstring's text
        is the description.  `name: text` in it, inline after a sentence or under a Google-style
        `Args:`, describes a parameter.  What is not given here is what `tool` says, if anything.

        Raises:
            ToolSchemaError: The signature cannot be a schema.
        """
        options = getattr(fn, _OPTIONS, {})
        name = name or options.get("name") or getattr(fn, "__name__", None)
        if not name or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise ToolSchemaError(f"{fn!r} needs a name: Tool.from_function(fn, name=...).")
        description, parameters, is_async = _signature(name, fn)
        return cls(
            name=name,
            description=description,
            parameters=parameters,
            fn=fn,
            is_async=is_async,
            timeout=options.get("timeout") if timeout is None else timeout,
            output_chars=options.get("output_chars") if output_chars is None else output_chars,
        )

    @classmethod
    def from_path(cls, path: str) -> Tool:
        """Import "package.module:function" and make a tool of it.

        Raises:
            ToolSchemaError: The module cannot be imported or has no such function.
        """
        module, _, attribute = path.partition(":")
        if not module or not attribute:
            raise ToolSchemaError(f"Tool {path!r}: write 'package.module:function'.")
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise ToolSchemaError(
                f"Tool {path!r}: importing {module} raised {type(error).__name__}: {error}.  It "
                "must be importable in every process that runs rollouts."
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise ToolSchemaError(f"Tool {path!r}: {module} has no {attribute!r}.")
            found = getattr(found, part)
        return found if isinstance(found, Tool) else cls.from_function(found)

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the form that chat templates take."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }

    def check(self, arguments: Mapping[str, Any]) -> str | None:
        """Why `arguments` violate the schema, or None.  Only an int may stand for a float."""
        problem = find_problem(self.name, self.parameters, arguments)
        if problem is None and self.validate is not None:
            problem = self.validate(arguments)
        return problem

    def convert(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that passed `check`, with each int that stands for a float made one."""
        return convert_floats(self.parameters, arguments)


def check_limits(whose: str, timeout: Any, output_chars: Any) -> None:
    """Raises ToolSchemaError for limits that are no numbers above 0."""
    for option, value, kinds, what in (
        ("timeout", timeout, (int, float), "a number"),
        ("output_chars", output_chars, (int,), "a whole number"),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            raise ToolSchemaError(f"{whose}: {option}={value!r} must be {what} above 0, or None.")


def tool(
    *, name: str | None = None, timeout: float | None = None, output_chars: int | None = None
) -> Callable[[F], F]:
    """A decorator: the name or limits of a function or method as a tool; it stays a function.

    Args:
        name: What the policy calls it; None: the function's name.
        timeout: Seconds until a call is given up; None: the environment's `tool_timeout`.
        output_chars: Most characters that the policy sees; None: its `tool_output_chars`.
    """

    def mark(fn: F) -> F:
        setattr(fn, _OPTIONS, {"name": name, "timeout": timeout, "output_chars": output_chars})
        return fn

    return mark


def _signature(name: str, fn: Callable[..., Any]) -> _Signature:
    """Description, parameters, and whether it is a coroutine function.

    Every trajectory has an environment of its own, so those of functions and methods are kept.
    """
    key = getattr(fn, "__func__", fn)
    if not inspect.isfunction(key):
        return _read_signature(name, fn)
    known = _known.setdefault(key, {})
    what = (name, inspect.ismethod(fn))
    if what not in known:
        known[what] = _read_signature(name, fn)
    return known[what]


def _read_signature(name: str, fn: Callable[..., Any]) -> _Signature:
    call = fn.func if isinstance(fn, functools.partial) else fn
    if not inspect.isroutine(call):
        call = getattr(call, "__call__", call)  # noqa: B004
    description, texts = _split_docstring(inspect.getdoc(fn) or "", _names(name, fn))
    is_async = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(call)
    return description, _parameters(name, fn, call, texts), is_async


def _names(tool: str, fn: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(fn).parameters)
    except (TypeError, ValueError) as error:
        raise ToolSchemaError(f"Tool '{tool}': the signature cannot be read ({error}).") from error


def _split_docstring(doc: str, names: list[str]) -> tuple[str, dict[str, str]]:
    """The description of the tool, and the text of each parameter that has one."""
    texts: dict[str, str] = {}
    if not names:
        return SECTIONS.split(doc)[0].strip(), texts
    # A marker begins a line or follows the end of a clause, so that prose with a colon is none.
    alternatives = "|".join(map(re.escape, names))
    marker = re.compile(
        rf"(?:^|(?<=\n)|(?<=[.,;!?)]\s)|(?<=\s\s))[ \t]*({alternatives})(?:\s*\([^)\n]*\))?:\s"
    )
    found = list(marker.finditer(doc))
    ends = [m.start() for m in found[1:]] + [len(doc)]
    for match, end in zip(found, ends, strict=False):
        text = SECTIONS.split(doc[match.end() : end])[0].split("\n\n")[0]
        texts.setdefault(match.group(1), " ".join(text.split()).rstrip(",;"))
    head = doc[: found[0].start()] if found else doc
    return SECTIONS.split(head)[0].strip(), texts


def _parameters(
    tool: str, fn: Callable[..., Any], call: Callable[..., Any], texts: dict[str, str]
) -> dict[str, Any]:
    """The JSON schema of the arguments."""
    try:
        hints = get_type_hints(call if hasattr(call, "__annotations__") else fn)
    except Exception as error:
        raise ToolSchemaError(
            f"Tool '{tool}': its annotations cannot be evaluated ({error}); import what they name "
            "at module level."
        ) from error
    parameters = inspect.signature(fn).parameters
    for name, parameter in parameters.items():
        where = f"Tool '{tool}', parameter '{name}'"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolSchemaError(f"{where}: *args and **kwargs have no schema; name each one.")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ToolSchemaError(f"{where} is positional-only: tools are called by keyword.")
        if name not in hints:
            raise ToolSchemaError(f"{where} has no annotation: write {name}: str (or its type).")
        _refuse_without_schema(hints[name], where)
    schema = _json_schema(tool, parameters, hints, texts)
    for name, parameter in parameters.items():
        default = parameter.default
        if default is None or isinstance(default, (str, int, float, bool)):
            schema["properties"][name]["default"] = default
    return schema


def _json_schema(
    tool: str,
    parameters: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
    texts: Mapping[str, str],
) -> dict[str, Any]:
    """transformers' schema of a function with these types and descriptions."""
    from transformers.utils import get_json_schema  # here, for it takes a second to import

    def stand_in() -> None:
        pass

    stand_in.__name__ = tool
    stand_in.__annotations__ = {name: hints[name] for name in parameters}
    stand_in.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=hints[name]) for name, p in parameters.items()]
    )
    lines = "\n".join(f"    {name}: {texts.get(name) or _NO_TEXT}" for name in parameters)
    stand_in.__doc__ = f"{tool}\n\nArgs:\n{lines}\n"
    try:
        schema: dict[str, Any] = get_json_schema(stand_in)["function"]["parameters"]
    except Exception as error:
        raise ToolSchemaError(f"Tool '{tool}' has no schema: {error}") from error
    for name, own in schema["properties"].items():
        text = texts.get(name)
        if not text:
            del own["description"]
        elif "(choices:" not in text.lower():  # an enum, which get_json_schema takes out
            own["description"] = text
    return schema


def _refuse_without_schema(hint: Any, where: str) -> None:
    """Raises for a type for which there is no exact schema."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint in JSON_TYPES:
        return
    if origin is Literal and all(a is None or type(a) in (str, int, float, bool) for a in args):
        return
    if origin is list or origin in (Union, types.UnionType):
        for part in args:
            _refuse_without_schema(part, where)
        return
    if origin is dict and args[0] is str:
        return _refuse_without_schema(args[1], where)
    raise ToolSchemaError(
        f"{where}: {hint!r} has no JSON schema here; use str, int, float, bool, None, Any, "
        "Literal, list[...], dict[str, ...] or a union of these."
    )
