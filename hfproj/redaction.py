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

from hfproj.secret_names import is_ordinary, is_secret, kind_of, variable

__all__ = [
    "is_secret", "known_secrets", "redact", "redact_words", "redacted", "remember", "secrets_in", "variable",
]  # fmt: skip

T = TypeVar("T")

_LEAST = 8  # characters of a value that is looked for everywhere

_START = r"(?<![A-Za-z0-9])"
TOKEN = re.compile(_START + r"(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,})")  # of the Hub
_SHAPES = re.compile(
    _START + r"(?:"
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{20,}"
    r"|sk-(?:\w{1,12}-){0,4}(?=\w*\d)[A-Za-z0-9]{16}[\w-]*|[rs]k_(?:live|test)_\w{16,}|gsk_[A-Za-z0-9]{30,}|r8_[A-Za-z0-9]{30,}|nvapi-[\w-]{30,}"
    r"|xai-[A-Za-z0-9]{40,}|(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?|eyJ[A-Za-z0-9+/_-]{40,}={0,2}|pypi-Ag[\w-]{30,}|npm_[A-Za-z0-9]{30,}"
    r"|dckr_pat_[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|wandb_v1_\w{20,}|dop_v1_[a-f0-9]{40,}|\d{8,10}:AA[\w-]{33}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}|hvs\.[\w-]{20,}|dapi[0-9a-f]{32}(?![0-9a-f])|ATATT3x[\w=-]{20,}|glsa_\w{20,}"
    r"|pplx-[A-Za-z0-9]{30,}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{30,}|lin_api_[A-Za-z0-9]{30,}|sbp_[a-f0-9]{30,}"
    r"|NRAK-[A-Z0-9]{20,}|sntrys_[\w=+/-]{20,}|PMAK-[a-f0-9-]{30,}|key-[0-9a-f]{32}(?![0-9a-f]))"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)"
    r"|(?<=hooks\.slack\.com/services/)[\w/]{20,}|(?<=/api/webhooks/)\d{5,25}/[\w-]{20,}"  # of Slack, of Discord
    r"|(?<=hooks\.zapier\.com/hooks/catch/)[\w/]{10,}|(?<=webhook\.office\.com/webhookb2/)[\w@/-]{20,}"
    r"|(?<=wandb login )[\w.-]{16,}|(?<=aws_secret_access_key )[\w+/-]{16,}",
    re.DOTALL,
)
# A password may hold a slash or an @; a port and a path behind it are none.
_IN_URL = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,30}://)"
    r"(?!\$)([^\s/@'\"<>:]{0,100}:(?!\d{1,5}/)(?:[^\s'\"<>@/]|/(?!/)){0,200}(?:@[^\s/'\"<>@:]{0,100}){0,3}"
    r"|(?<=https://)(?!git@)[^\s/@'\"<>:]{1,300}|(?<=http://)[^\s/@'\"<>:]{1,300})@(?!sha256:)(?=[\w.\[$-])"
)
# The same without a scheme, as JSON escapes it, and as a URL within a URL.
_IN_OTHER_URL = re.compile(
    r"((?<![:\w/])//|:\\/\\/|%3A%2F%2F)"
    r"(?!\$)([^\s/@'\"<>:%]{1,100}(?::|%3A)(?!\d{1,5}/)[^\s'\"<>@/]{1,200}?)(@|%40)(?=[\w.\[$-])",
    re.IGNORECASE,
)
# Without a scheme, and a name alone in front of an @: secrets if they do not look like words.
_PAIR_AT = re.compile(
    r"(?<![\w/:@.+-])[\w.+-]{1,64}:(?P<value>[^\s/@:'\",;]{8,200})@(?!sha256:)(?=[\w\[$-])"
    r"|(?<=ftp://)(?P<name>[^\s/@:'\"<>]{8,200})@(?=[\w.\[$-])"
)
# A name and what stands between it and its value are found first, the value where the name asks for it.
_NAMED = re.compile(r"(?<![\w.-])(-{0,2}[A-Za-z_][\w.-]{0,80})(?:\\?[\"'])?\s*\\?[=:]\s*")
_FLAG = re.compile(r"(?<!\S)(--?[A-Za-z][\w.-]{0,80})\s+(?!-)")
_OF_NAMED = re.compile(
    r"(?P<open>\$?\\?[\"'])?(?P<value>(?(open)[^\"'\\\n]{1,1000}"
    r"|(?!\$)(?:[^\s\"',;&}\])\\]|\\[ $&;,()#!*?|<>`~]){1,1000}))"
)
_MORE = re.compile(r"(?:,[^\s\"',;&}\])\\=:]{1,1000}(?![\w.-]*[=:])){1,100}")  # of a list of secrets, or a comma in one
_OF_FLAG = re.compile(r"(?P<open>\$?[\"'])?(?P<value>(?(open)[^\"']{1,1000}|(?!\$)(?:[^\s\"'\\]|\\[^\"'\n]){1,1000}))")
# Programs that take a password behind a flag of one letter; until the end of their command.
_PROGRAMS = {
    "sshpass": ("p",), "mysql": ("p",), "mariadb": ("p",), "mongo": ("p",), "redis-cli": ("a",), "ldapsearch": ("w",),
    "curl": ("u", "U", "user", "proxy-user"), "login": ("p",),
}  # fmt: skip
_PROGRAM = re.compile("|".join(_PROGRAMS))
_OWN_WORD = re.compile(f"({_PROGRAM.pattern})(?:dump|admin|import|sh|restore)?")
_SPACED = re.compile(r"(-{0,2}[A-Za-z_][\w.-]{0,80})=([^=]{0,1000}\s[^=]{0,1000})")  # a value with blanks, as one word
_COMMAND = re.compile(
    r"(?P<end>[\n;|&])|(?<![\w.-])(?P<program>sshpass|mysql(?:dump|admin|import)?|mariadb|mongo(?:sh|dump|restore)?|redis-cli"
    r"|ldapsearch|curl|(?:docker|podman|nerdctl|helm|oras|crane|skopeo|buildah|az|oc)\s[^\n;|&]{0,60}?(?<=\s)login)(?!\S)"
    r"|(?<!\S)-(?:(?P<flag>[puaUw])(?P<by>\s*)|[A-Za-z]{1,5}(?P<last>[uU])\s+|-(?P<long>user|proxy-user)(?:=|\s+))"
    r"(?P<open>\$?[\"'])?(?P<value>(?(open)[^\"']{1,1000}|(?![$-])(?:[^\s\"'\\;|&]|[;|&](?=\S)|\\[^\"'\n]){1,1000}))"
)
_HEADER = re.compile(r"(?i)(\b(?:bearer|authorization[\"']?\s*[:=]\s*[\"']?\w+)\s+)([A-Za-z0-9._~+/=-]{8,})")
_WORTH = re.compile(r"[=:@]|-[A-Za-z]|%40|bearer|PRIVATE|[A-Za-z0-9_.-]{18}", re.IGNORECASE)
_passed: set[str] = set()


def remember(secret: object) -> None:
    """Note a token that was passed to a function, so that it is not kept anywhere."""
    if isinstance(secret, str) and len(secret) >= _LEAST:
        _passed.add(secret)


def known_secrets() -> dict[str, str]:
    """Return the secrets of this process, value → variable: of its environment, its command, and what was passed."""
    found = {
        value: f"${name}"
        for name, value in os.environ.items()
        if is_secret(name, value) and name not in ("PWD", "OLDPWD")
    }
    for value, name in list(found.items()):  # a list of secrets, and one with blanks around it
        parts = [part.strip() for part in value.split(",")]
        found |= {part: name for part in parts if is_secret(name[1:], part)}
    words = list(map(str, sys.argv))
    for word, value in zip(words, [*words[1:], ""]):
        name, equals, own = word.partition("=")
        if name.startswith("-") and is_secret(name, own if equals else value):
            found.setdefault(own if equals else value, variable(name))
        for own_name, start, end in _beside(_NAMED, _OF_NAMED, word):
            found.setdefault(word[start:end], variable(own_name))
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
    """Return what finds these values, as they are and as URLs write them; words only where they stand alone."""
    forms: set[str] = set()
    for value in known:
        for quoted in (quote(value), quote(value, safe="")):
            forms |= {value, quoted, re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), quoted)}
    words = {form for form in forms if is_ordinary(form)}
    alone, anywhere = ("|".join(map(re.escape, sorted(part, key=len, reverse=True))) for part in (words, forms - words))
    return re.compile("|".join([f"(?:{anywhere})"] * bool(anywhere) + [rf"(?<!\w)(?:{alone})(?!\w)"] * bool(alone)))


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
    if "@" in text:
        text = _PAIR_AT.sub(_without_pair, _IN_URL.sub(r"\1$CREDENTIALS@", text) if "://" in text else text)
    if "@" in text or "%40" in text:
        text = _IN_OTHER_URL.sub(r"\1$CREDENTIALS\3", text)
    text = _HEADER.sub(lambda m: m[0] if is_ordinary(m[2]) else f"{m[1]}$SECRET", text)
    for names, values in ((_NAMED, _OF_NAMED), (_FLAG, _OF_FLAG)):
        text = _hide(text, _beside(names, values, text))
    return _hide(text, _behind_programs(text)) if _PROGRAM.search(text) else text


def _without_pair(match: re.Match[str]) -> str:
    part = "value" if match["value"] else "name"
    start, end = (place - match.start() for place in match.span(part))
    return match[0] if is_ordinary(match[part]) else f"{match[0][:start]}$CREDENTIALS{match[0][end:]}"


def _hide(text: str, secrets: Iterable[tuple[str, int, int]]) -> str:
    """Put variables in place of secrets, each given by its name, its start and its end."""
    found, at = [], 0
    for name, start, end in secrets:
        found += [text[at:start], variable(name)]
        at = end
    return "".join([*found, text[at:]]) if found else text


def _beside(names: re.Pattern[str], values: re.Pattern[str], text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the secrets that stand beside their names; other values may hold such pairs again."""
    at = 0
    for match in names.finditer(text):
        if (
            match.start() < at
            or not (kind := kind_of(name := match[1]))
            or not (found := values.match(text, match.end()))
        ):
            continue
        value = found["value"]
        prose = ":" in text[match.end(1) : match.end()] and not found["open"] and kind != "password"
        if is_secret(name, value) and not (prose and is_ordinary(value)):
            more = None if found["open"] or names is _FLAG else _MORE.match(text, found.end())
            at = more.end() if more else found.end("value")
            yield name, found.start("value"), at


def _behind_programs(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the passwords that programs such as ``docker login`` take behind a flag."""
    program = ""
    for match in _COMMAND.finditer(text):
        if match["end"]:
            program = ""
        elif match["program"]:
            program = _PROGRAM.findall(match["program"])[-1]
        elif _takes(program, match["flag"] or match["last"] or match["long"], match["value"], glued=match["by"] == ""):
            yield "PASSWORD", *match.span("value")


def _takes(program: str, flag: str, value: str, *, glued: bool) -> bool:
    """Return whether a value behind a program's flag is a password, or holds one."""
    alone = program in ("mysql", "mariadb") and not glued  # these ask for it, and a name of a data set follows
    return flag in _PROGRAMS.get(program, ()) and not alone and (program != "curl" or ":" in value)


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
        if len(value) == 2 and isinstance(value[0], str) and is_secret(value[0], value[1]):
            return [text(value[0]), variable(value[0])]
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
    if isinstance(value, list | tuple) and isinstance(name, str) and kind_of(name):
        return [variable(name) if is_secret(name, part) else _redacted(part, text) for part in value]
    if isinstance(value, Mapping) and isinstance(name, str) and kind_of(name):  # {"api_key": {"value": …}}
        held = {key: variable(name) for key in ("value", "default") if is_secret(name, value.get(key))}
        return _redacted({**value, **held}, text)
    return variable(name) if is_secret(name, value) else _redacted(value, text)


def _words(words: Iterable[str], text: Callable[[str], str]) -> list[str]:
    found: list[str] = []
    before = flag = program = ""
    for word in words:
        flag = word if word.startswith("-") else flag
        behind = before.startswith("-") and "=" not in before and not word.startswith("-")
        if behind and is_secret(before, word):
            found.append(variable(before))
        elif behind and _takes(program, before.lstrip("-"), word, glued=False):
            found.append("$PASSWORD")
        elif program and _takes(program, word[1:2], word[2:], glued=True) and re.match("-[^-].", word):
            found.append(f"{word[:2]}$PASSWORD")
        elif not behind and "=" not in word and flag != word and is_secret(flag, word) and not is_ordinary(word):
            found.append(variable(flag))  # a further one behind its flag
        elif (pair := _SPACED.fullmatch(word)) and is_secret(pair[1], pair[2]):
            found.append(f"{pair[1]}={variable(pair[1])}")
        else:
            found.append(text(word))
        last = _OWN_WORD.fullmatch(word.rpartition("/")[2]) if len(word) < 100 else None
        program = last[1] if last else program
        before = word
    return found
