"""
Redaction by pattern: the secrets in a text, before it leaves.

Pure: no I/O, no locks, no knowledge of events.  `redact_text` takes the secrets out of
a text and leaves the rest readable: messages of exceptions, URLs, stack traces.

In doubt the rules hide: a lost word costs less than a leaked one.  What they cannot
know they leave alone: names and postal addresses, phone numbers and national ids
without a key that names them, secrets in the path of a URL, a password in prose ("my
password is hunter2"), and whatever is encoded as a whole (base64, HTML entities,
percent escapes).  `redact_keys` adds keys, `before_send` rules of another kind.
"""

from __future__ import annotations

import base64
import re
import string
from typing import TYPE_CHECKING, Final, NamedTuple

from pgtrack._cards import hide_cards
from pgtrack._keys import DEFAULT_RULE, REDACTED, KeyRule, hide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["redact_text"]


# What can be told by its shape


def _hide_parameters(match: re.Match[str]) -> str:
    return _PARAMETER.sub(f"={REDACTED}", match[0])


def _hide_credentials(match: re.Match[str]) -> str:
    """Return the scheme with its credentials hidden, if they are not just a word."""
    scheme, credentials = match[1], match[2]
    bare = credentials.rstrip(".-")
    is_secret = _LOOKS_SECRET[scheme.strip().casefold()]
    return scheme + REDACTED if is_secret(bare) else match[0]


def _is_basic(credentials: str) -> bool:
    """Tell whether *credentials* are `user:password` in base64, RFC 7617."""
    whole = credentials.rstrip("=")
    whole = whole[: len(whole) // 4 * 4]
    return _NOT_BASE64.search(whole) is None and b":" in base64.b64decode(whole)


def _is_bearer(credentials: str) -> bool:
    """Tell whether *credentials* are a token, RFC 6750, and no word of a sentence."""
    return "=" not in credentials.rstrip("=") and bool(_RANDOM.search(credentials))


# What ends a sentence or closes a bracket around a value, and is left in place.
_PUNCTUATION: Final = ".,;:!?)]}"
_PARAMETER = re.compile(
    rf"=(?!{re.escape(REDACTED)}[{re.escape(_PUNCTUATION)}]*(?:[&#]|\Z))"
    rf"[^&#]*[^&#{re.escape(_PUNCTUATION)}]"
)
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")
# A digit in five characters or more, or capitals inside of twelve.
_RANDOM = re.compile(r"\A(?=.{5})\D*[0-9]|\A(?=.{12})(?=.*[a-z]).+[A-Z]")
_LONG_RANDOM = re.compile(r"\A(?=.{16})\D*[0-9]")
_LOOKS_SECRET: Final[dict[str, Callable[[str], object]]] = {
    "basic": _is_basic,
    "bearer": _is_bearer,
    "token": _LONG_RANDOM.search,  # Django REST framework, GitHub
}

# Letters of internationalised addresses (RFC 6531), punctuation left out.
_INTERNATIONAL: Final = (
    "\u00c0-\u1fff\u2c00-\u2fff\u3040-\ud7ff\uf900-\ufdff\U00010000-\U0010ffff"
)
_LOCAL: Final = rf"[A-Za-z0-9_.+%\-{_INTERNATIONAL}]"
_LABEL: Final = rf"[A-Za-z0-9_\-{_INTERNATIONAL}]"
_LETTER: Final = rf"[A-Za-z{_INTERNATIONAL}]"

# Not the `git@` of a clone, not versions (pkg@1.2.3-rc.one), not images of double
# density (icon@2x.png), no hosts without a dot.
_EMAIL = re.compile(
    rf"(?<!{_LOCAL})(?!git@){_LOCAL}+(?:@|%40)"
    rf"(?!v?[0-9]+\.[0-9]|[1-9]x\.)(?:{_LABEL}+\.)+"
    rf"(?:xn--[A-Za-z0-9-]+|{_LETTER}{{2,}})"
)


# Where a token may begin.  The n of an escaped line break in a `repr` is no part of it.
# From the second a text as long as a token can be read only once.
_EDGE: Final = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
_WIDE_EDGE: Final = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))"


class _Rule(NamedTuple):
    mark: str  # no match without this character; the cheapest look comes first
    needles: tuple[str, ...]  # nor without one of these
    find: re.Pattern[str]  # linear: what repeats cannot start again where it failed
    put: str | Callable[[re.Match[str]], str]


# Secrets known by the text around them.  Each has a mark that plain words lack.
_PLACES: Final = (
    # What pydantic was given may be what was typed into the wrong field.
    _Rule(
        "=",
        ("input_value=",),
        re.compile(r"(input_value=)(?:(?!, input_type=|input_value=)[^\n])+"),
        rf"\1{REDACTED}",
    ),
    # The same in `ValidationError.errors()`, which FastAPI logs and answers.
    _Rule(
        "{",
        ("'input'", '"input"'),
        re.compile(
            r"""(["']msg["']: ?(?:'[^'\n]*'|"(?:[^"\\\n]|\\.)*"), ?["']input["']: ?)"""
            r"""(?:(?!, ?["'](?:ctx|url)["']:|\}[,\])]|["']msg["']: )[^\n])+"""
        ),
        rf"\1{REDACTED}",
    ),
    # Values bound to a statement: SQLAlchemy's message of any driver's error.
    _Rule(
        "[",
        ("[parameters: ",),
        re.compile(r"(\[parameters: )[^\n]+"),
        rf"\1{REDACTED}]",
    ),
    # A whole row: PostgreSQL on a violated constraint.
    _Rule(
        "(",
        ("Failing row contains (",),
        re.compile(r"(Failing row contains \()[^\n]+"),
        rf"\1{REDACTED})",
    ),
    # A password in a statement, as the account is made or changed.
    _Rule(
        "'",
        ("ASSWORD '", "assword '", "ED BY '", "ed by '"),
        re.compile(
            r"(\b(?:password|identified by) ')(?:[^'\\\n]|\\.|'')+", re.IGNORECASE
        ),
        rf"\1{REDACTED}",
    ),
    # The value that exists already: SQL Server, MongoDB, MySQL.  The name of an index
    # does not say what is in it, so the value goes whatever the index.
    _Rule(
        "(",
        ("duplicate key value is (",),
        re.compile(r"(duplicate key value is \()[^\n]+"),
        rf"\1{REDACTED})",
    ),
    _Rule(
        "{",
        ("dup key: {",),
        re.compile(r"(dup key: \{)[^\n]+"),
        rf"\1{REDACTED}}}",
    ),
    _Rule(
        "'",
        ("Duplicate entry '",),
        re.compile(r"(Duplicate entry ')(?:(?!' for key |Duplicate entry ')[^\n])+"),
        rf"\1{REDACTED}",
    ),
    # User and password of a URL, up to the last @ of the authority, since a password
    # may hold one.  With a colon it may even hold ? and #.  Slashes as some JSON
    # encoders escape them.  `git@` is the same for all, and no secret.
    _Rule(
        "@",
        (":/", ":\\/"),
        re.compile(
            r"""(:\\?/\\?/)(?!git@)(?:"""
            r"""(?:[^\s/?\#"'<>\\]|(?<=\w)'(?=\w))+"""
            r"""|[^\s/?\#@:"'<>\\]*:(?![0-9]+[?\#])[^\s/"'<>\\]+"""
            r""")@"""
        ),
        rf"\1{REDACTED}@",
    ),
    # Each value in a query, and in a fragment that is written like one.  A backslash
    # continues it unless it escapes a quote or a line break of the text around.
    _Rule(
        "=",
        ("?", "#"),
        re.compile(r"""(?:\?|(?<=\S)\#)(?:[^\s"'<>`\\]+|'(?=\w)|\\(?!["'nrt\\]))+"""),
        _hide_parameters,
    ),
    # Email addresses; in a path the @ may be escaped.
    _Rule("@", (".",), _EMAIL, REDACTED),
    _Rule("%", ("%40",), _EMAIL, REDACTED),
)

# Secrets known by their own shape.  All have at least `_SHORTEST_SHAPE` characters.
_SHAPES: Final = (
    # Private keys: all of it, to the end of the text if the end of the key is cut off.
    _Rule(
        "-",
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
            r".*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)",
            re.DOTALL,
        ),
        REDACTED,
    ),
    # JSON Web Tokens, signed or encrypted, RFC 7515 and 7516: {" in base64 is eyJ.
    _Rule(
        ".",
        ("eyJ",),
        re.compile(
            rf"{_WIDE_EDGE}eyJ[A-Za-z0-9_-]{{9,}}\.[A-Za-z0-9_-]{{7,}}"
            r"(?:\.[A-Za-z0-9_-]*)*"
        ),
        REDACTED,
    ),
    # AWS access key ids, of users and of sessions; Google API keys.
    _Rule(
        "A",
        ("AKIA", "ASIA", "AIza"),
        re.compile(
            rf"{_EDGE}(?:A[KS]IA[A-Z0-9]{{16}}(?![A-Za-z0-9])"
            r"|AIza[A-Za-z0-9_-]{35})"
        ),
        REDACTED,
    ),
    # GitHub, both generations of tokens; npm, which took over the shape.
    _Rule(
        "_",
        ("gh", "github_pat_", "npm_"),
        re.compile(rf"{_EDGE}(?:gh[pousr]|github_pat|npm)_[A-Za-z0-9_]{{20,}}"),
        REDACTED,
    ),
    # Stripe: secret and restricted keys, and what signs its webhooks.  The publishable
    # keys are in each customer's browser.
    _Rule(
        "_",
        ("k_live_", "k_test_", "whsec_"),
        re.compile(rf"{_EDGE}(?:[rs]k_(?:live|test)|whsec)_[A-Za-z0-9]{{14,}}"),
        REDACTED,
    ),
    # Slack: tokens of users, bots and applications, and webhooks, whose path is secret.
    _Rule(
        "-",
        ("xox", "xapp-"),
        re.compile(rf"{_EDGE}(?:xox[a-z]|xapp)-[A-Za-z0-9-]{{15,}}"),
        REDACTED,
    ),
    _Rule(
        "/",
        ("hooks.slack.com/",),
        re.compile(r"(hooks\.slack\.com/[a-z]+/)[A-Za-z0-9/_-]+"),
        rf"\1{REDACTED}",
    ),
    # OpenAI, Anthropic and their likes, GitLab, PyPI.  With a digit: there are classes
    # of style sheets that begin with sk-.
    _Rule(
        "-",
        ("sk-", "glpat-", "pypi-"),
        re.compile(
            rf"{_WIDE_EDGE}(?:sk|glpat|pypi)-"
            r"(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}"
        ),
        REDACTED,
    ),
)

_SHORTEST_SHAPE: Final = 20

# Credentials after the name of their scheme, unless the name is just a word: a basic
# understanding, the bearer of bad news.
_CREDENTIALS = re.compile(
    rf"{_EDGE}((?:bearer|basic|token) +)(?!(?:bearer|basic|token) )"
    r"([A-Za-z0-9._~+/-]+=*)",
    re.IGNORECASE,
)


def _by_mark(rules: Iterable[_Rule]) -> tuple[tuple[str, tuple[_Rule, ...]], ...]:
    """Return *rules* in order, those of a mark together."""
    groups: dict[str, list[_Rule]] = {}
    for rule in rules:
        groups.setdefault(rule.mark, []).append(rule)
    return tuple((mark, tuple(group)) for mark, group in groups.items())


_PLACES_BY_MARK: Final = _by_mark(_PLACES)
_SHAPES_BY_MARK: Final = _by_mark(_SHAPES)


def _apply(text: str, rules: tuple[tuple[str, tuple[_Rule, ...]], ...]) -> str:
    for mark, group in rules:
        if mark in text:
            for rule in group:
                for needle in rule.needles:
                    if needle in text:
                        text = rule.find.sub(rule.put, text)
                        break
    return text


# What can be told by the key before it

_REACH: Final = 128
"""Characters before a separator in which its key is looked for."""

# All of a run, from its start.  Not the colon of a URL, nor that of a time.
_SEPARATOR = re.compile(
    r"[:=](?<![:=]{2})[:=]*(?![:=])>?"
    r"(?!(?<=:)//|(?<=[0-9]:)[0-9][0-9](?![0-9A-Za-z]))"
)
_SEPARATORS: Final = frozenset((":", "=", "==", "===", "=>", ":=", ":=>"))
# Blanks, quotes that may be escaped, and brackets: user['pin'] = ..., (pin)=(1234).
_AFTER_KEY: Final = " \t\"'`\\])"
_KEY_LETTERS: Final = string.ascii_letters + string.digits + "_.$-"
_NAME_BACKWARDS = re.compile(r"[\w.$-]*")
_PHRASE_BACKWARDS = re.compile(r"(?:[\w.$-]+ ?){0,3}")  # yek ipa ruoy
_NAME = re.compile(r"[\w.$-]+")

# Opens a quoted value: a prefix as in b'', and what a nested `repr` put before it.
_OPENING = re.compile(r"""[bBfFrRuU]{0,2}(\\{0,15})(["'`])""")
_CLOSING: Final = {quote: re.compile(rf"(?<!\\)(\\*){quote}") for quote in "\"'`"}
# A bracket, or a quoted text whose brackets are none.
_BRACKET = re.compile(
    r"""[\[{(\]})]"""
    r"""|(?<!\\)(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")""",
    re.DOTALL,
)
_DEPTH: Final = dict.fromkeys("[{(", 1) | dict.fromkeys("]})", -1)
_BLANKS = re.compile(r"[ \t]+")
_ANY_BLANKS = re.compile(r"\s+")

# The name of a scheme may stay, what follows it is the secret.
_SCHEME = re.compile(
    r"(?:apikey|aws4-hmac-sha256|basic|bearer|digest|negotiate|ntlm|token)[ \t]+(?=\S)",
    re.IGNORECASE,
)

# A value without quotes.  It ends where its list or sentence goes on, not at a comma or
# bracket within it: `hunter,2` is one, `hunter2,user=ann` is not.
_BARE = re.compile(
    r"""(?:[^\s,;&'"<>)\]}|`\\]+"""
    r"""|\\(?!["'nrt])"""
    r"""|[,;&'"<>)\]}|`](?=\w)(?![\w.%-]+[=:\[]))+"""
)
# Digits in groups (a phone number, a card), an IBAN.
_SPACED = re.compile(
    r"(?:[A-Z]{2}[0-9]{2}(?: [A-Z]{4})?|[+(]*[0-9][0-9()./-]*)"
    r"(?: \(?[0-9][0-9()./-]*(?![\w:=]))+"
)
# The further cookies of the header, the arguments of a scheme.
_COOKIES = re.compile(r"""(?:; ?[^\s;,'"]+)+""")
_ARGUMENT: Final = r"""[\w-]+=(?:"[^"\n]*"|[^\s,'"]+)"""
_ARGUMENTS = re.compile(f"{_ARGUMENT}(?:, ?{_ARGUMENT})*")

# fmt: off
# Words that no secret is, with which a sentence goes on: "token: expected a string".
_NO_SECRETS: Final = frozenset((
    "a", "an", "and", "any", "apikey", "are", "authentication", "basic", "bearer",
    "blank", "bool", "bytes", "can", "cannot", "connection", "could", "digest", "does",
    "empty", "enabled", "ensure", "enter", "error", "expected", "expecting", "expired",
    "failed", "false", "field", "input", "int", "invalid", "is", "it", "malformed",
    "may", "missing", "must", "nil", "no", "none", "not", "null", "object", "optional",
    "please", "required", "should", "str", "string", "text", "the", "this", "timeout",
    "token", "tokens", "too", "true", "undefined", "unexpected", "unknown", "value",
    "was", "you", "your",
))
# fmt: on
_PLACEHOLDER: Final = "*?.•…"  # what others put in the place of secrets


class _Key(NamedTuple):
    name: str
    is_quoted: bool


def _last(backwards: re.Pattern[str], text: str) -> str:
    """Return what matches at the end of *text*, read from there."""
    match = backwards.match(text[::-1])
    return match[0][::-1] if match else ""


def _key_before(text: str, start: int, end: int, keys: KeyRule) -> _Key | None:
    """Return the sensitive key that ends at *end*, or None."""
    head = text[max(start, end - _REACH) : end]
    bare = head.rstrip(_AFTER_KEY)
    front = bare.rstrip(_KEY_LETTERS)
    name = bare[len(front) :]
    if front.endswith("\\") and not keys.is_sensitive(name):
        name = name[1:]  # the n of an escaped line break
    elif front and not front[-1].isascii():
        # A letter of another alphabet, which takes three times as long.
        name = _last(_NAME_BACKWARDS, bare)
    if keys.is_sensitive(name) or (
        name.casefold() in keys.tails
        and keys.is_sensitive(_last(_PHRASE_BACKWARDS, bare))
    ):
        return _Key(name, is_quoted=bool(head[len(bare) :].strip(" \t")))
    if head.endswith(")") and text.startswith("=(", end):
        # PostgreSQL: Key (tenant, lower(email::text))=(acme, ann@example.com)
        columns = _NAME.findall(head, max(0, head.rfind("Key (")))
        if any(map(keys.is_sensitive, columns)):
            return _Key(name, is_quoted=True)
    return None


def _after_quote(text: str, start: int, slashes: int, quote: str) -> int:
    r"""
    Return where the quoted text that begins at *start* ends; that of *text* if open.

    Behind n backslashes the text is quoted within another.  There the closing quote
    has n too, fewer if an outer text ends, and one in the value 2n + 1: `\"a\\\"b\"`.
    """
    closing = _CLOSING[quote]
    while (match := closing.search(text, start)) is not None:
        extra = len(match[1]) - slashes
        start = match.end()
        if extra < 0:
            return match.start()
        if extra % (2 * (slashes + 1)) == 0:
            if slashes or not text.startswith(quote, start):
                return start - 1 - slashes
            start += 1  # doubled, as SQL escapes it
    return len(text)


def _after_bracket(text: str, start: int) -> int:
    """Return where the bracket opened at *start* is closed, or the end of *text*."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += _DEPTH.get(match[0], 0)
        if not depth:
            return match.end()
    return len(text)


def _bare_end(text: str, start: int, key: str, *, has_scheme: bool) -> int:
    """Return where the value without quotes or brackets ends; *start* if none is."""
    if has_scheme and (match := _ARGUMENTS.match(text, start)):
        return match.end()
    match = _BARE.match(text, start)
    if match is None:
        return start
    value = match[0].rstrip(_PUNCTUATION)
    end = start + len(value)
    if value.casefold() in _NO_SECRETS or not value.strip(_PLACEHOLDER):
        return start
    if spaced := _SPACED.match(text, start):
        end = max(end, spaced.end())
    if key.casefold().endswith("cookie") and (more := _COOKIES.match(text, end)):
        end = more.end()
    return end


def _value_span(text: str, start: int, key: str) -> tuple[int, int]:
    """Return where the secret begins and ends in the value at *start*."""
    if opening := _OPENING.match(text, start):
        start = opening.end()
        end = _after_quote(text, start, len(opening[1]), opening[2])
        scheme = _SCHEME.match(text, start, end)
        return (scheme.end() if scheme else start), end
    if scheme := _SCHEME.match(text, start):
        start = scheme.end()
    if text.startswith(("[", "{", "("), start):
        end = _after_bracket(text, start)
        if text.startswith(")=(", start - 2) and text.endswith(")", start, end):
            return start + 1, end - 1  # what PostgreSQL writes
        return start, (end if end - start > len("()") else start)
    return start, _bare_end(text, start, key, has_scheme=scheme is not None)


def _assigned(text: str, keys: KeyRule) -> list[tuple[int, int]]:
    """Return where the values of sensitive keys stand: `password=...`, `"pin": ...`."""
    spans: list[tuple[int, int]] = []
    done = position = 0
    while match := _SEPARATOR.search(text, position):
        position = match.end()
        if match[0] not in _SEPARATORS:
            continue
        key = _key_before(text, done, match.start(), keys)
        if key is None:
            continue
        blanks = _ANY_BLANKS if key.is_quoted else _BLANKS
        if blank := blanks.match(text, position):
            position = blank.end()
        start, end = _value_span(text, position, key.name)
        if end > start:
            spans.append((start, end))
            done = position = end
    return spans


# A key and its value as a pair, which headers are to ASGI: (b'x-api-key', b'...').  Or
# as arguments of a command: ['--password', '...'].
_PAIR = re.compile(
    r"""(?:(?P<pair>\()b?\\{0,7}["']|\\{0,7}["']--?)(?P<key>[\w.$-]{1,64})"""
    r"""\\{0,7}["'], ?(?=b?\\{0,7}["'])"""
)
_PAIR_ENDS = re.compile(r"""\\{0,7}["'],?\)""")
# <password>...</password>, as SOAP and configuration files have it.
_ELEMENT = re.compile(r"<(?P<key>[\w.:-]{1,64})(?:\s[^<>]*)?>(?P<value>[^<]+)</")


def _paired(text: str, keys: KeyRule) -> Iterator[tuple[int, int]]:
    """Yield where the values of sensitive keys stand in pairs of quoted texts."""
    done = 0
    for match in _PAIR.finditer(text):
        if match.start() < done or not keys.is_sensitive(match["key"]):
            continue
        start, end = _value_span(text, match.end(), match["key"])
        if end > start and (not match["pair"] or _PAIR_ENDS.match(text, end)):
            yield start, end
            done = end


def _enclosed(text: str, keys: KeyRule) -> Iterator[tuple[int, int]]:
    """Yield where the values of sensitive keys stand as the text of an element."""
    for match in _ELEMENT.finditer(text):
        if keys.is_sensitive(match["key"]):
            yield match.span("value")


# All of it

_ROUNDS: Final = 4
"""
Rounds until a text must have settled.  The first finds nearly all and the second shows
it; more are for texts made up to outwit a single one.
"""


def redact_text(text: str, keys: KeyRule = DEFAULT_RULE) -> str:
    """
    Return *text* without the secrets that can be told by their shape or their key.

    The time is linear in the length, also for texts made up to be slow.  Redacting the
    result once more changes nothing: a text that has not settled after four rounds is
    replaced as a whole.

    Args:
        text: Any text, with or without the escapes and quotes of a `repr` or of JSON.
            Whole rather than cut: half of a secret may look like none.

        keys: The rule for keys written in the text: `password=...`, `"token": "..."`.
    """
    for _ in range(_ROUNDS):
        redacted = _redact_once(text, keys)
        if redacted == text:
            return text
        text = redacted
    return REDACTED


# The first look at a text; most short ones have none of these.
_MARKS = re.compile(f"[{re.escape(''.join(mark for mark, _ in _PLACES_BY_MARK))}]")


def _redact_once(text: str, keys: KeyRule) -> str:
    if len(text) >= _SHORTEST_SHAPE:
        text = _apply(text, _SHAPES_BY_MARK)
    if " " in text:
        folded = text.casefold()
        if "bearer " in folded or "basic " in folded or "token " in folded:
            text = _CREDENTIALS.sub(_hide_credentials, text)
    text = hide_cards(text)
    if _MARKS.search(text):
        text = _apply(text, _PLACES_BY_MARK)
        if "'," in text or '",' in text:
            text = hide(text, _paired(text, keys))
    if (":" in text or "=" in text) and (spans := _assigned(text, keys)):
        text = hide(text, spans)
    if "</" in text:
        text = hide(text, _enclosed(text, keys))
    return text
