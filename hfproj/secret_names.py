"""Which arguments, options and variables hold a secret, by their names and by how a value looks."""

import re
from functools import lru_cache

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# What any name has that is looked at; others hold nothing secret.
_HINT = re.compile(
    r"key|tok|pass|pwd?|secret|cred|bearer|cookie|auth|sig|otp|pat|login|vault|session|connection|proxy|user|jwt",
    re.IGNORECASE,
)
_PASSWORD = re.compile(
    r"\w*pass(word|wd|phrase|code)s?|(?:my|db|sql|admin|root|ftp|ssh|smtp|user|pg)?pwd|credentials?|creds|bearer|cookie|authorization|t?otp"
)
_PASS = re.compile(
    r"(?:db|ssh|user|my|root|admin|sql|mysql|pg|smtp|ftp|key|store|redis|proxy|http|mail|login|hub|hf)pass"
)
_BEHIND_SECRET = {"key", "access", "token", "base"}  # secret_key_base is one, secret_santa is none
# What such a word is only spoken of by; `--password_file x` names a file.
_ABOUT = re.compile(
    r"file|path|dir|folder|name|length|len|size|count|type|kind|policy|env|prefix|variable|manager|backend|url"
    r"|host|field|ids|id|mask|index|dim|embedding|pruning|dropout|pooling|mixing|level|parallelism"
)
_OF_PROGRAMS = [["forward"], ["backward"], ["n"], ["num"], ["first"], ["second"], ["single"], ["multi"], ["by"]]
# Words behind the one that counts.
_VALUES = {
    "value",
    "string",
    "str",
    "text",
    "plain",
    "raw",
    "hex",
    "base64",
    "b64",
    "v",
    "prod",
    "production",
    "dev",
    "staging",
}
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
    r"|shared|webhook|session|refresh|subscription|github|gitlab|gh|gl|db|root|user"
)
_KEYS_OF_DATA = re.compile(
    r"image|images|img|label|labels|text|sort|cache|primary|foreign|column|dataset|data|feature|features|target"
    r"|targets|input|output|batch|dict|metric|row|sample|index|module|view|views|pixel|caption|query|value|kv"
    r"|attention|group|class|config|json|yaml|hot|public|main|by|state|model|name|id|sentence|audio|video|patch"
    r"|head|monitor|prng|random|rng|teacher|student|checkpoint|split|file|url|user"
)
_NO_SECRET = re.compile(
    r"|true|false|none|null|yes|no|on|off|auto|default|required|optional|cls|mean|max|last|first|patch|\$.*|%\w+%|<[^<>]*>|\*+|\.\.\.|…|\d{1,6}",
    re.IGNORECASE | re.DOTALL,
)
_ORDINARY = re.compile(r"[A-Za-z]+\d{0,4}(?:[_./ -][A-Za-z]*\d{0,4})*|[\d.]+|.{0,7}", re.DOTALL)
_PAIR = re.compile(r"[^\s:/@]+:(?!\d{1,5}(?:/|$))(?P<second>[^\s@/]{4,})(?P<host>@\S+)?")


def kind_of(name: str) -> str:
    """Return what the value of a name is.

    "password"; "secret"; "perhaps" (as it looks); "pair" (a name, a colon, and a password, or a name alone); or ""
    (nothing secret).

    Example:
        >>> [kind_of(name) for name in ("--db_password", "hub_token", "--tokens", "http_proxy", "num_tokens")]
        ['password', 'secret', 'perhaps', 'pair', '']
    """
    return _kind(name[-200:]) if _HINT.search(name) else ""


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    parts = [part.lower() for part in _WORD.findall(name)]
    if parts[-2:] == ["connection", "string"]:
        return "secret"
    while len(parts) > 1 and (parts[-1] in _VALUES or parts[-1].isdigit()):
        parts.pop()
    if not parts:
        return ""
    *before, last = parts
    if parts[-3:] == ["access", "key", "id"]:
        return "secret"
    if parts[-2:] == ["session", "id"] or last == "sessionid":
        return "perhaps"
    if _ABOUT.fullmatch(last):
        return ""
    hidden = (
        p.rstrip("s").endswith("secret") and {*parts[i + 1 : i + 2]} <= _BEHIND_SECRET for i, p in enumerate(parts)
    )
    programs = last == "pass" and before[-1:] not in _OF_PROGRAMS
    if any(map(_PASSWORD.fullmatch, parts)) or any(hidden) or programs or _PASS.fullmatch(last):
        return "password"
    if last in ("proxy", "userpwd") or parts in (["user"], ["proxy", "user"]):
        return "pair"
    if last in ("auth", "signature", "sig", "login", "vault", "jwt"):
        return "perhaps"
    return _of_token_or_key(before[-1] if before else "", last)


def _of_token_or_key(before: str, last: str) -> str:
    if last in ("pw", "pat", "tok", "toke"):  # short for a password and a token, or for words of another kind
        return "secret" if _STRONG.fullmatch(before) or (last, before) == ("pw", "") else "" if before else "perhaps"
    for of, ordinary in (("token", _TOKENS_OF_TEXT), ("key", _KEYS_OF_DATA)):
        joined, _, plural = last.rpartition(of)
        if not last.endswith((of, f"{of}s")) or plural not in ("", "s"):
            continue
        qualifier = joined or before
        if _STRONG.fullmatch(qualifier) and not (of == "key" and qualifier == "user"):
            return "secret"
        if plural and of == "token" and not qualifier:
            return "perhaps"
        if plural or ordinary.fullmatch(qualifier) or (joined and of == "key"):
            return ""
        return "secret" if of == "token" else "perhaps"
    return ""


def is_ordinary(value: str) -> bool:
    """Return whether a value looks like words, names, paths or numbers, each of those with commas between them.

    Example:
        >>> is_ordinary("vit-small.p16,b"), is_ordinary("Zq8xW2vN5tR7")
        (True, False)
    """
    return all(map(_ORDINARY.fullmatch, re.split("[,;]", value)))


def is_secret(name: object, value: object) -> bool:
    """Return whether an argument, option or variable of this name and value is a secret.

    Example:
        >>> is_secret("--hub_token", "enterprise-xyz"), is_secret("image_key", "img"), is_secret("token", True)
        (True, False, False)
    """
    kind = kind_of(name) if isinstance(name, str) else ""
    if not kind or isinstance(value, bool) or not isinstance(value, str | int):
        return False
    if isinstance(value, int):
        return kind == "password" and abs(value) > 999
    if kind == "password" and re.fullmatch(r"\d{4,}", value):
        return True
    if _NO_SECRET.fullmatch(value):
        return False
    if kind == "pair":
        pair = _PAIR.fullmatch(value)
        return pair is not None and (pair["host"] is not None or not is_ordinary(pair["second"]))
    return kind != "perhaps" or not is_ordinary(value)


def variable(name: str) -> str:
    """Return the variable that stands for the value of an argument.

    Example:
        >>> variable("--hub_token"), variable("wandb.api_key")
        ('$HF_TOKEN', '$WANDB_API_KEY')
    """
    plain = "_".join(_WORD.findall(name[-60:])).upper()
    return "$HF_TOKEN" if plain in ("TOKEN", "HUB_TOKEN", "HF_TOKEN", "PUSH_TO_HUB_TOKEN") else f"${plain or 'SECRET'}"
