"""Secrets in text that is kept: what is known to be one, and what has the form of one, becomes the name of a variable.

Known are: the values of arguments, options and environment variables whose name says so (``--hub_token``,
``WANDB_API_KEY``), wherever they stand; what was passed as a token (`remember`); and the credentials in a URL. By their
form: tokens of the Hub, GitHub, GitLab, Slack, OpenAI and others, keys of AWS and Google, JSON web tokens, private
keys. A command with ``$HF_TOKEN`` in it still runs where that is set. What is ordinary stays as it is: revisions,
``--image_key``, ``pad_token``, ``num_tokens``.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PASSWORD = re.compile(r"pass(word|wd|phrase|code)s?|pwd|secrets?|credentials?|bearer|cookie|authorization")
# What such a word is only spoken of by; `--password_file x` names a file.
_ABOUT = re.compile(
    r"file|path|dir|folder|name|length|len|size|count|type|kind|policy|env|prefix|variable|manager|backend|url"
    r"|host|field|ids|id|mask|index|dim|embedding|pruning|dropout|pooling|mixing|level|parallelism"
)
_OF_PROGRAMS = [["forward"], ["backward"], ["n"], ["num"], ["first"], ["second"], ["single"], ["multi"], ["by"]]
_VALUES = {"value", "string", "str", "text", "plain", "raw", "hex", "base64", "b64"}  # words behind the one that counts
_TOKENS_OF_TEXT = re.compile(
    r"pad|eos|bos|unk|sep|cls|mask|class|reg|register|image|img|audio|video|vision|visual|special|dist"
    r"|distillation|first|last|per|patch|pool|pooling|pooled|prompt|start|end|begin|max|min|num|n|stop|decoder"
    r"|encoder|additional|extra|virtual|text|vocab|query|next|new|prefix|suffix|sub|word|sentence|boi|eoi|by|of|no"
    r"|drop|mean|global|local|summary|single|each|total|boundary|separator|classification|trainable|latent|memory"
    r"|semantic|mem|frame|content"
)
_STRONG = re.compile(
    r"api|access|secret|private|auth|ssh|license|licence|encryption|signing|master|account|storage|wandb|comet"
    r"|neptune|mlflow|clearml|openai|anthropic|hf|hub|huggingface|aws|azure|gcp|google|deploy|service|admin|client"
    r"|shared|webhook|session|refresh|subscription|github|gitlab"
)
_KEYS_OF_DATA = re.compile(
    r"image|images|img|label|labels|text|sort|cache|primary|foreign|column|dataset|data|feature|features|target"
    r"|targets|input|output|batch|dict|metric|row|sample|index|module|view|views|pixel|caption|query|value|kv"
    r"|attention|group|class|config|json|yaml|hot|public|main|by|state|model|name|id|sentence|audio|video|patch"
    r"|head|monitor|prng|random|rng|teacher|student|checkpoint|split|file|url"
)
_NO_SECRET = re.compile(
    r"|true|false|none|null|yes|no|on|off|auto|default|required|optional|cls|mean|max|last|first|patch|\$.*|%\w+%|<[^<>]*>|\*+|\.\.\.|…|\d{1,6}",
    re.IGNORECASE | re.DOTALL,
)
_ORDINARY = re.compile(r"[A-Za-z]+\d{0,4}(?:[_./ -][A-Za-z]*\d{0,4})*|[\d.]+|.{0,7}", re.DOTALL)
_LEAST = 8  # characters of a value that is looked for everywhere

_START = r"(?<![A-Za-z0-9_])"
TOKEN = re.compile(_START + r"(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,})")  # of the Hub
_SHAPES = re.compile(
    _START + r"(?:"
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{20,}"
    r"|sk-(?:\w{1,12}-){0,4}(?=\w*\d)[A-Za-z0-9]{16}[\w-]*|[rs]k_(?:live|test)_\w{16,}|gsk_[A-Za-z0-9]{30,}|r8_[A-Za-z0-9]{30,}|nvapi-[\w-]{30,}"
    r"|xai-[A-Za-z0-9]{40,}|(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?|eyJ[A-Za-z0-9+/_-]{40,}={0,2}|pypi-Ag[\w-]{30,}|npm_[A-Za-z0-9]{30,}"
    r"|dckr_pat_[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|wandb_v1_\w{20,}|dop_v1_[a-f0-9]{40,}|\d{8,10}:AA[\w-]{33}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)"
    r"|(?<=hooks\.slack\.com/services/)[\w/]{20,}",
    re.DOTALL,
)
# A password may hold a slash or an @; a port and a path behind it are none.
_IN_URL = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,30}://)"
    r"(?!\$)([^\s/@'\"<>:]{0,100}:(?!\d{1,5}/)(?:[^\s'\"<>@/]|/(?!/)){0,200}(?:@[^\s/'\"<>@:]{0,100}){0,3}"
    r"|(?<=https://)(?!git@)[^\s/@'\"<>:]{1,300}|(?<=http://)[^\s/@'\"<>:]{1,300})@(?!sha256:)(?=[\w.\[$-])"
)
_NAMED = re.compile(
    r"(?<![\w.-])(?P<name>-{0,2}[A-Za-z_][\w.-]{0,80})(?:\\?[\"'])?(?P<by>\s*[=:]\s*)"
    r"(?P<open>\\?[\"'])?(?P<value>(?(open)[^\"'\\\n]{1,1000}|[^\s\"',;&}\])\\]{1,1000}))"
)
_FLAG = re.compile(
    r"(?<!\S)(?P<name>--?[A-Za-z][\w.-]{0,80})(?P<by>\s+)(?P<open>[\"'])?(?P<value>(?(open)[^\"']{1,1000}|(?!-)[^\s\"']{1,1000}))"
)
_HEADER = re.compile(r"(?i)(\b(?:bearer|authorization[\"']?\s*[:=]\s*[\"']?\w+)\s+)([A-Za-z0-9._~+/=-]{8,})")
_WORTH = re.compile(r"[=:@]|-[A-Za-z]|bearer|PRIVATE|[A-Za-z0-9_.-]{18}", re.IGNORECASE)
_passed: set[str] = set()


def remember(secret: object) -> None:
    """Note a token that was passed to a function, so that it is not kept anywhere."""
    if isinstance(secret, str) and len(secret) >= _LEAST:
        _passed.add(secret)


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    """Return what the value of a name is: "password", "secret", "perhaps" (as it looks), or "" (nothing secret)."""
    parts = [part.lower() for part in _WORD.findall(name[-200:])]
    if parts[-2:] == ["connection", "string"]:
        return "secret"
    while len(parts) > 1 and (parts[-1] in _VALUES or parts[-1].isdigit()):
        parts.pop()
    if not parts:
        return ""
    *before, last = parts
    if parts[-3:] == ["access", "key", "id"]:
        return "secret"
    if _ABOUT.fullmatch(last):
        return ""
    if any(map(_PASSWORD.fullmatch, parts)) or (last.endswith("pass") and before[-1:] not in _OF_PROGRAMS):
        return "password"
    for of, ordinary in (("token", _TOKENS_OF_TEXT), ("key", _KEYS_OF_DATA)):
        joined, _, plural = last.rpartition(of)
        if not last.endswith((of, f"{of}s")) or plural not in ("", "s"):
            continue
        qualifier = joined or (before[-1] if before else "")
        if _STRONG.fullmatch(qualifier):
            return "secret"
        if plural or ordinary.fullmatch(qualifier) or (joined and of == "key"):
            return ""
        return "secret" if of == "token" else "perhaps"
    return "perhaps" if last in ("auth", "signature", "sig") else ""


def is_secret(name: object, value: object) -> bool:
    """Return whether an argument, option or variable of this name and value is a secret.

    Example:
        >>> is_secret("--hub_token", "enterprise-xyz"), is_secret("image_key", "img"), is_secret("token", True)
        (True, False, False)
    """
    kind = _kind(name) if isinstance(name, str) else ""
    if not kind or isinstance(value, bool) or not isinstance(value, str | int):
        return False
    if isinstance(value, int):
        return kind == "password" and abs(value) > 999
    if kind == "password" and re.fullmatch(r"\d{4,}", value):
        return True
    if _NO_SECRET.fullmatch(value):
        return False
    return kind != "perhaps" or not _ORDINARY.fullmatch(value)


def variable(name: str) -> str:
    """Return the variable that stands for the value of an argument.

    Example:
        >>> variable("--hub_token"), variable("wandb.api_key")
        ('$HF_TOKEN', '$WANDB_API_KEY')
    """
    plain = "_".join(_WORD.findall(name[-60:])).upper()
    return "$HF_TOKEN" if plain in ("TOKEN", "HUB_TOKEN", "HF_TOKEN", "PUSH_TO_HUB_TOKEN") else f"${plain or 'SECRET'}"


def known_secrets() -> dict[str, str]:
    """Return the secrets of this process, value → variable: of its environment, its command, and what was passed."""
    found = {
        value: f"${name}"
        for name, value in os.environ.items()
        if is_secret(name, value) and name not in ("PWD", "OLDPWD")
    }
    words = list(map(str, sys.argv))
    for word, value in zip(words, [*words[1:], ""]):
        name, equals, own = word.partition("=")
        if name.startswith("-") and is_secret(name, own if equals else value):
            found.setdefault(own if equals else value, variable(name))
        for match in _NAMED.finditer(word):
            if is_secret(match["name"], match["value"]):
                found.setdefault(match["value"], variable(match["name"]))
    for value in _passed | _stored():
        found.setdefault(value, "$HF_TOKEN")
    return {value: name for value, name in found.items() if len(value) >= (2 * _LEAST if value.isalpha() else _LEAST)}


def _stored() -> set[str]:
    """Return the token of ``hf auth login``."""
    with suppress(ImportError, OSError, ValueError):
        from huggingface_hub import get_token

        return {token} if (token := get_token()) else set()
    return set()


@lru_cache(maxsize=8)
def _values(known: tuple[str, ...]) -> re.Pattern[str]:
    forms = {form for value in known for form in (value, quote(value, safe=""))}
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, sorted(forms, key=len, reverse=True))) + r")(?!\w)")


def secrets_in(text: str, known: Mapping[str, str], *, by_form: bool = True) -> Iterator[str]:
    """Yield what secrets a text holds, in words, by their value or their form; names beside them are not looked at."""
    if known and (found := _values(tuple(known)).search(text)):
        words = known.get(found.group(), "a secret")
        yield f"the value of {words}" if words.startswith("$") else words
    if TOKEN.search(text):
        yield "an access token"
    if by_form and _SHAPES.search(text):
        yield "a token or a private key"
    if by_form and _IN_URL.search(text):
        yield "the credentials of a URL"


def redact(text: str, known: Mapping[str, str] | None = None) -> str:
    """Return a text with variables in place of its secrets; `known` are those of `known_secrets`.

    Example:
        >>> redact("a.py --hub_token enterprise-xyz --data https://me:word@host/x --image_key img")
        'a.py --hub_token $HF_TOKEN --data https://$CREDENTIALS@host/x --image_key img'
    """
    known = known_secrets() if known is None else known
    if known:
        text = _values(tuple(known)).sub(lambda match: known.get(match.group(), "$SECRET"), text)
    if not _WORTH.search(text):
        return text
    text = _SHAPES.sub("$SECRET", TOKEN.sub("$HF_TOKEN", text))
    text = _IN_URL.sub(r"\1$CREDENTIALS@", text)
    text = _HEADER.sub(lambda m: m[0] if _ORDINARY.fullmatch(m[2]) else f"{m[1]}$SECRET", text)
    return _hide(_FLAG, _hide(_NAMED, text))


def _hide(pattern: re.Pattern[str], text: str) -> str:
    """Put variables in place of the secrets that stand beside their names; other values may hold such pairs again."""
    found, at = [], 0
    while match := pattern.search(text, at):
        name, value = match["name"], match["value"]
        prose = ":" in match["by"] and not match["open"] and _kind(name) != "password"
        if is_secret(name, value) and not (prose and _ORDINARY.fullmatch(value)):
            found += [text[at : match.start("value")], variable(name)]
            at = match.end("value")
        else:
            found.append(text[at : match.end("by")])
            at = match.end("by")
    return "".join([*found, text[at:]])


def redact_words(words: Iterable[str], known: Mapping[str, str] | None = None) -> list[str]:
    """Return the words of a command without secrets, that behind a flag too.

    Example:
        >>> redact_words(["a.py", "--wandb_key", "local-1234", "--key", "image"])
        ['a.py', '--wandb_key', '$WANDB_KEY', '--key', 'image']
    """
    return _words(words, partial(redact, known=known_secrets() if known is None else known))


def redacted(value: T) -> T:
    """Return a structure of dictionaries, lists, dataclasses and texts without secrets.

    Example:
        >>> redacted({"recipe": {"api_key": "abcd1234", "epochs": 3}, "image_key": "img"})
        {'recipe': {'api_key': '$API_KEY', 'epochs': 3}, 'image_key': 'img'}
    """
    return _redacted(value, lru_cache(maxsize=None)(partial(redact, known=known_secrets())))


def _redacted(value: Any, text: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {_redacted(name, text): _entry(name, part, text) for name, part in value.items()}
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], str) and all(isinstance(part, str) for part in value):
            return _words(value, text)
        return [_redacted(part, text) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        new = {name: _entry(name, part, text) for name, part in old.items()}
        return replace(value, **new) if new != old else value
    return value


def _entry(name: Any, value: Any, text: Callable[[str], str]) -> Any:
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, list) and isinstance(name, str) and _kind(name):
        return [variable(name) if is_secret(name, part) else _redacted(part, text) for part in value]
    return variable(name) if is_secret(name, value) else _redacted(value, text)


def _words(words: Iterable[str], text: Callable[[str], str]) -> list[str]:
    found: list[str] = []
    before = ""
    for word in words:
        behind = before.startswith("-") and "=" not in before and not word.startswith("-") and is_secret(before, word)
        found.append(variable(before) if behind else text(word))
        before = word
    return found
