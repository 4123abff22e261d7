"""
Redaction by key: whether the value under a key must go as a whole.

Pure, and safe to ask from any thread or signal handler.  In doubt a key is sensitive: a
lost value costs less than a leaked one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DEFAULT_KEYS", "DEFAULT_RULE", "REDACTED", "KeyRule", "hide"]

REDACTED: Final = "[redacted]"
"""What stands where a secret stood.  Redacting again leaves it as it is."""


def hide(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """
    Return *text* with `REDACTED` in place of each span.

    Spans come in the order of their starts; those that overlap count as one.
    """
    parts: list[str] = []
    done = 0
    for start, end in spans:
        if start >= done:
            parts += text[done:start], REDACTED
        done = max(done, end)
    return "".join((*parts, text[done:])) if parts else text


# fmt: off
DEFAULT_KEYS: Final[tuple[str, ...]] = tuple(sorted((
    # Passwords.  "pass" alone is a test result or a boarding pass: it needs company.
    "admin pass", "auth pass", "database pass", "db pass", "pass phrase *", "passwd *",
    "password *", "pw", "pwd", "root pass", "smtp pass", "user pass",

    # Codes that stand in for a password.  "code" alone is a status or a country.
    "2fa code", "access code", "auth code", "authorization code", "backup code",
    "code verifier", "mfa code", "one time code", "otp", "otp code", "pass code", "pin",
    "pin code", "recovery code", "recovery phrase", "seed phrase", "sms code", "totp",
    "verification code",

    # Tokens.  The plural alone counts what a language model reads: see _HARMLESS.
    "access token *", "api token *", "auth token *", "bearer", "bearer token *", "jwt",
    "id token *", "refresh token *", "session token *", "token",

    # Keys.  "key" alone is a primary key, a key of a cache, a key on the keyboard.
    "access key *", "account key", "api key *", "app key", "auth key", "encryption key",
    "license key", "master key", "private key *", "secret key *", "service key",
    "session key", "shared key", "signing key", "ssh key", "webhook key",

    # Secrets that say so, and what contains one.
    "client secret *", "connection string", "cred", "credential", "secret",

    # What a browser sends to prove who it is.
    "auth", "authorization", "cookie", "csrf", "csrf middleware token", "xsrf",

    # Payment cards and bank accounts.
    "account number", "acct number", "bank account", "card code", "card no", "card num",
    "card number *", "card pan", "cc no", "cc num", "cc number", "credit card", "cvc",
    "cvv", "debit card", "iban", "routing number", "security code",

    # Numbers that a state gave to a person, and the date that goes with them.
    "birth date", "birthday", "date of birth", "dob", "driver license",
    "driver license number", "drivers license", "drivers license number",
    "national id", "national insurance number", "passport", "passport number",
    "social security", "social security number", "ssn *", "tax id", "tax number",

    # How to reach a person.  In a text addresses go by pattern, phones only by key.
    "email", "email address", "mobile number", "mobile phone", "phone", "phone number",
    "tel", "telephone", "telephone number",
)))
"""
The keys that are sensitive unasked, as words.

A key matches if its words end in such a sequence, in any notation and number:
`userPassword`, `X-Api-Key`, `card_number2`, `APIKEY`, `access tokens`.  After an entry
with `*` other words may follow (`api_key_prod`), unless the last of them shows that
the value is only about the secret (`api_key_id`, `password_length`).
"""

# Last words of a key whose value is the secret in another dress: password_hash.
_DRESSES: Final = frozenset((
    "again", "b", "base", "bytes", "confirm", "confirmation", "current", "digest",
    "encrypted", "hash", "hashed", "header", "hex", "new", "old", "plain", "plaintext",
    "raw", "repeat", "salt", "string", "str", "text", "value",
))

# Last words of a key whose value is about a secret: password_changed_at, api_key_id.
_ABOUT: Final = frozenset((
    "age", "algorithm", "at", "attempt", "attempts", "by", "change", "changed", "count",
    "created", "date", "disabled", "enabled", "endpoint", "error", "errors", "exists",
    "expiration", "expired", "expires", "expiry", "failed", "failure", "failures",
    "field", "file", "format", "forgotten", "id", "ids", "in", "invalid", "issuer",
    "len", "length", "lifetime", "limit", "max", "method", "min", "missing", "mode",
    "name", "names", "on", "page", "path", "policy", "present", "provider", "quality",
    "required", "requirements", "reset", "retries", "rotated", "rotation", "rules",
    "scope", "scopes", "score", "set", "size", "source", "status", "strength", "time",
    "ttl", "type", "types", "updated", "uri", "url", "used", "valid", "validity",
    "verified", "version", "visibility", "visible",
))

# First words that make a key a question or a switch: has_password, send_email.
_SWITCHES: Final = frozenset((
    "allow", "allows", "are", "can", "did", "does", "enable", "enables", "had", "has",
    "is", "needs", "no", "require", "required", "requires", "send", "should", "show",
    "skip", "supports", "uses", "was",
))

# Endings that only look sensitive.  The longer ending counts: refresh_tokens is.
_HARMLESS: Final = frozenset((
    # What a language model reads and writes, and where it stops.
    "tokens", "bostoken", "completiontoken", "eostoken", "firsttoken", "inputtoken",
    "masktoken", "maxtoken", "outputtoken", "padtoken", "pertoken", "prompttoken",
    "specialtoken", "stoptoken", "unktoken",

    # Pins of maps and boards; a header of CORS and a flag of XMLHttpRequest.
    "pins", "allowcredentials", "withcredentials",
))
# fmt: on

# No other word ends in these, so they count when glued to a name: PGPASSWORD.
_GLUED: Final = ("apikey", "passphrase", "passwd", "password", "secretkey")

_KNOWN_KEYS: Final = 1_024
"""Verdicts a rule keeps: more keys than a program has, fewer than one can send it."""

_KNOWN_KEY: Final = 64
"""Characters of the longest key kept, so that the memory is bounded in bytes too."""

_NOT_WORD = re.compile(r"[\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # a|Bc, A|Bc


def _words(key: str) -> list[str]:
    """Return the words of *key*; camelCase, digits and punctuation divide them."""
    if not key.isascii():
        key = unicodedata.normalize("NFKC", key)  # fullwidth and other dressed letters
    return [word for word in _NOT_WORD.split(_CAMEL.sub(" ", key).casefold()) if word]


def _glue(keys: Iterable[str]) -> frozenset[str]:
    """
    Return the words of each key glued together, and the plural.

    Glued, since that makes "api key", "apiKey" and "apikey" one.
    """
    singular = ["".join(_words(key)) for key in keys]
    return frozenset(singular).union(
        word + ("es" if word.endswith("s") else "s") for word in singular
    )


@dataclass(frozen=True, init=False)
class KeyRule:
    """
    Decide by its key whether a value is sensitive: `DEFAULT_KEYS`, and yours on top.

    Rules of equal extras are equal.  Verdicts on about a thousand keys are remembered,
    without a lock: threads, signal handlers and finalizers may ask at any moment.

    Args:
        extra: Further keys, in the notation of the defaults or any other (`nationalId`,
            `patient_*`).  They too match as whole words: `tenant` hides what is under
            `tenant` and `acme.tenant`, not `tenant_name` nor `subtenant`; `tenant*`
            all but the last.  They win over the exceptions that keep `max_tokens` or
            `is_admin` readable.

    Raises:
        ValueError: A key in *extra* has no letter.
    """

    extra: tuple[str, ...]
    tails: frozenset[str] = field(repr=False, compare=False)
    _ends: frozenset[str] = field(repr=False, compare=False)
    _anywhere: frozenset[str] = field(repr=False, compare=False)
    _own_ends: frozenset[str] = field(repr=False, compare=False)
    _own_anywhere: frozenset[str] = field(repr=False, compare=False)
    _longest: int = field(repr=False, compare=False)
    _known: dict[str, bool] = field(repr=False, compare=False)

    def __init__(self, extra: Iterable[str] = ()) -> None:
        own = {
            key: _words(key)
            for key in sorted({extra} if isinstance(extra, str) else set(extra))
        }
        for key, words in own.items():
            if not words:
                raise ValueError(
                    "`redact_keys` must hold keys with at least one letter (got one"
                    f" of {len(key)} characters without). Leave it out."
                )
        every = {key: _words(key) for key in DEFAULT_KEYS} | own
        tails = {words[-1] for words in every.values() if len(words) > 1}
        put = object.__setattr__  # the class is frozen
        put(self, "extra", tuple(own))
        put(self, "tails", _DRESSES | tails)
        put(self, "_ends", _glue(every))
        put(self, "_anywhere", _glue(key for key in every if key.endswith("*")))
        put(self, "_own_ends", _glue(own))
        put(self, "_own_anywhere", _glue(key for key in own if key.endswith("*")))
        put(self, "_longest", max(map(len, every.values())))
        put(self, "_known", {})

    def is_sensitive(self, key: str) -> bool:
        """Tell whether the value under *key* must be replaced as a whole."""
        verdict = self._known.get(key)
        if verdict is None:
            verdict = self._judge(key)
            if len(key) <= _KNOWN_KEY:
                if len(self._known) >= _KNOWN_KEYS:
                    self._known.clear()
                self._known[key] = verdict
        return verdict

    def _judge(self, key: str) -> bool:
        words = _words(key)
        if self.extra and (
            not self._own_ends.isdisjoint(self._endings(words))
            or self._occurs(self._own_anywhere, words)
        ):
            return True
        if not words or words[0] in _SWITCHES:
            return False
        while True:
            for ending in self._endings(words):
                if ending in _HARMLESS:
                    return False
                if ending in self._ends:
                    return True
            if len(words) == 1 or words[-1] not in _DRESSES:
                break
            words.pop()
        return words[-1] not in _ABOUT and (
            any(word.endswith(_GLUED) for word in words)
            or self._occurs(self._anywhere, words)
        )

    def _endings(self, words: list[str]) -> list[str]:
        """Return the last words glued together, the most of them first."""
        first = max(0, len(words) - self._longest)
        return ["".join(words[start:]) for start in range(first, len(words))]

    def _occurs(self, sequences: frozenset[str], words: list[str]) -> bool:
        """Tell whether one of *sequences* stands anywhere in *words*."""
        return any(
            "".join(words[start : start + count]) in sequences
            for start in range(len(words))
            for count in range(1, self._longest + 1)
        )


DEFAULT_RULE: Final = KeyRule()
"""The rule of `DEFAULT_KEYS` alone."""
