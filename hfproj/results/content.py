"""How much text and how many answers a `results.json` of somebody else may hold: each costs when it is shown."""

from collections.abc import Mapping
from typing import Any

from hfproj import limits
from hfproj.strict_json import short


def check_content(content: Mapping[str, Any]) -> None:
    """Refuse what goes beyond `hfproj.limits`; answers row by row count as rows, not as text.

    Raises:
        ValueError: If a text is too long, or texts (each counted once) or answers are too many.

    Example:
        >>> check_content({"notes": ["a" * 100_000]})
        Traceback (most recent call last):
        ValueError: it holds a text of 100,000 letters, more than 65,536: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…
    """
    found: dict[str, None] = {}
    level: list[Any] = [{name: part for name, part in content.items() if name != "measurements"}]
    rows = 0
    for measurement in content.get("measurements") or ():
        if isinstance(measurement, Mapping):
            own = dict(measurement)
            rows += 4 * len(text) if isinstance(text := own.pop("outcomes", ""), str) else 0  # four rows a digit
            level.append(own)
    while level:
        parts: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                found.update(dict.fromkeys(value))
                parts += value.values()
            else:
                parts += value
        found.update((part, None) for part in parts if isinstance(part, str))
        level = [part for part in parts if isinstance(part, dict | list)]
    longest = max(found, key=len, default="")
    if len(longest) > limits.RESULTS_TEXT:
        what = f"a text of {len(longest):,} letters, more than {limits.RESULTS_TEXT:,}"
        raise ValueError(f"it holds {what}: {short(longest, 32)}")
    if (letters := sum(map(len, found))) > limits.RESULTS_TEXTS:
        raise ValueError(f"its texts have {letters:,} letters, more than {limits.RESULTS_TEXTS:,}")
    if rows > limits.RESULTS_ROWS:
        raise ValueError(f"it holds answers of {rows:,} rows, more than {limits.RESULTS_ROWS:,}")
