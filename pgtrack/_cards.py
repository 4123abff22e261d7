"""
Redaction of payment cards: which digits are the number of one.

By the issuer's prefix, its lengths and the check digit, so that order numbers and
milliseconds since 1970 stay.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from pgtrack._keys import hide

__all__ = ["hide_cards", "is_card_number"]


class _Issuer(NamedTuple):
    prefix: str  # a regular expression for the first digits
    lengths: tuple[int, ...]


# Ranges as the issuers give them out; where two share one, each length counts.  UATP
# (1...) is left out: until 2033 so begin the milliseconds since 1970.
_ISSUERS: Final = (
    _Issuer("4", (13, 16, 19)),  # Visa; 13 is history, but still in test data
    _Issuer("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
    _Issuer("3[47]", (15,)),  # American Express
    _Issuer("30[0-59]|3[689]", (14, 16, 19)),  # Diners Club
    _Issuer("6011|64[4-9]|65", (16, 19)),  # Discover
    _Issuer("352[89]|35[3-8]", (16, 19)),  # JCB
    _Issuer("62|81", (16, 17, 18, 19)),  # UnionPay
    _Issuer("5018|5020|5038|5[678]|6304|639|67", (13, 15, 16, 18, 19)),  # Maestro
    _Issuer("220[0-4]", (16, 17, 18, 19)),  # Mir
    _Issuer("508|60|82", (16,)),  # RuPay, Hipercard
    _Issuer("50[679]", (16, 18, 19)),  # Verve, Elo, Dankort's relatives
    _Issuer("5019", (16,)),  # Dankort
    _Issuer("9792", (16,)),  # Troy
)
_CARD = re.compile(
    "|".join(
        f"(?={issuer.prefix})[0-9]{{{length}}}"
        for issuer in _ISSUERS
        for length in issuer.lengths
    )
)
_FEWEST_DIGITS: Final = min(min(issuer.lengths) for issuer in _ISSUERS)
_MOST_DIGITS: Final = max(max(issuer.lengths) for issuer in _ISSUERS)

# 19 digits are written in fours and three; nobody writes more groups than that.
_MOST_GROUPS: Final = 5

# The cheap first look: enough digits near each other.  A failed attempt reads at most a
# dozen characters, and the blanks behind them.
_MANY_DIGITS = re.compile(r"[0-9][0-9 -]{11,}[0-9]")

# A run of digits in groups, taken as a whole.  A UUID is taken first: some have groups
# without a letter.
_DIGITS = re.compile(
    r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}"
    r"|(?P<groups>[0-9]+(?:[ -][0-9]+)*)"
)
_GROUP = re.compile(r"[0-9]+")
# What makes the digits beside it part of something else: a word, a hexadecimal number,
# a decimal one.  An escaped line break in a `repr` does not.
_SPOILT_BEFORE = re.compile(r"(?<!\\)[A-Za-z]\Z|\\(?![nrt])[A-Za-z]\Z|[0-9]\.\Z")
_SPOILT_AFTER = re.compile(r"[A-Za-z]|\.[0-9]")

_DOUBLED = str.maketrans("0123456789", "0246813579")  # doubled, its digits added up
_ZERO = ord("0")


def _is_card(digits: str) -> bool:
    """Tell whether *digits* have an issuer, its length, and a check digit that fits."""
    if _CARD.fullmatch(digits) is None:
        return False
    # The Luhn formula, ISO/IEC 7812-1, annex B.
    added = digits[-1::-2] + digits[-2::-2].translate(_DOUBLED)
    return (sum(added.encode()) - _ZERO * len(added)) % 10 == 0


def is_card_number(value: float) -> bool:
    """
    Tell whether a bare number is that of a payment card.

    A float counts if it is whole.  Order numbers and stamps in milliseconds or finer
    are none, but for the tenth that have an issuer's prefix and length by chance and
    pass the check digit.
    """
    if isinstance(value, float):
        if not value.is_integer():
            return False
        value = int(value)
    if not 10 ** (_FEWEST_DIGITS - 1) <= value < 10**_MOST_DIGITS:
        return False
    return _is_card(str(int(value)))


def hide_cards(text: str) -> str:
    """Return *text* without the numbers of cards in it."""
    if len(text) >= _FEWEST_DIGITS and _MANY_DIGITS.search(text):
        return _DIGITS.sub(_hide_cards_in_groups, text)
    return text


def _hide_cards_in_groups(match: re.Match[str]) -> str:
    """Return a run of digits without the cards in it, each of up to five groups."""
    run, text = match[0], match.string
    if match["groups"] is None or len(run) < _FEWEST_DIGITS:
        return run
    groups = [group.span() for group in _GROUP.finditer(run)]
    if _SPOILT_BEFORE.search(text[max(0, match.start() - 2) : match.start()]):
        del groups[0]
    if groups and _SPOILT_AFTER.match(text, match.end()):
        groups.pop()
    ends = [end for _, end in groups]
    cards: list[tuple[int, int]] = []
    for first, (start, _) in enumerate(groups):
        last = min(first + _MOST_GROUPS, len(ends)) - 1
        # The longest that fits, so that no digits of a long number stay behind.
        while last >= first and (length := ends[last] - start) >= _FEWEST_DIGITS:
            if length < _MOST_DIGITS + _MOST_GROUPS and _is_card(
                run[start : ends[last]].replace(" ", "").replace("-", "")
            ):
                cards.append((start, ends[last]))
                break
            last -= 1
    return hide(run, cards)
