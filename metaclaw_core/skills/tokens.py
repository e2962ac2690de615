"""Text into terms: the one tokeniser that index and query share.

Design: lower-cased runs of Unicode word characters, so "pull-request", "pull_request" and "pull/request" are
the same two words. A Chinese, Japanese or Korean stretch has no spaces to split at and becomes its overlapping
character pairs; as one word it would match nothing but itself. Pairs of hiragana alone are left out: they are
Japanese grammar, which would tie any polite phrase to any skill written in Japanese.

Function words are dropped, those of English and the commonest of five other languages: in a library that is mostly
English a foreign "how" is rare, and rare words weigh most. Long English words lose their inflection, which matters
in a library of forty skills more than in one of thousands.

Names whose sign is part of them (C++, C#, F#, .NET) keep it: without it they would be a single letter or a word
that means something else.

Limits: no dictionary and no language detection. Function words that mean something in English ("die", "os", "ci")
stay, those of further languages too. Compounds ("Datenbankmigration") stay whole.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

MAX_QUERY_CHARS = 2_000
"""Longest text of one turn that takes part in a query. Measured: a longer one ranks no better, and time grows with it."""

_HEAD_CHARS = 1_500  # of those: a request stands before its paste or after it, rarely in the middle

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(r"[^\W_]+(?:\+\+|#(?!\w))?|(?<!\w)\.net\b")
_CJK_ANY = re.compile(f"[{_CJK}]")
_HIRAGANA = re.compile(r"[\u3040-\u309f\u30fc]+")
_CJK_RUN = re.compile(f"[{_CJK}]+|[^{_CJK}]+")

_ENGLISH = (
    "a about after again all also am an and any are as at be because been before being both but by can could did do "
    "does doing don done down during each else few for from further get give had has have having he her here hers him "
    "his how i if in into is isn it its itself just let ll like m make may me might mine more most must my need no "
    "nor not now of off ok on once only or other our ours out over own please re s same shall she should so some such "
    "t than that the their theirs them then there these they this those through to too under until up us ve very want "
    "was we were what when where which while who whom whose why will with won would yes you your yours "
)
# Of German, French, Spanish, Portuguese and Italian.
_OTHERS = (
    "aber algo alla als anche ao aos así au auch auf aus aux avec bei bis bist bitte bonjour cada ce ces cette che "
    "chi ciao como con cosa cual cuando cui cuál cuándo cómo danke dann dans das dass de dei dein del dele della "
    "delle dem der des dich do doch donde dove du durch dónde e ein eine einem einen einer eines el ela ele ella "
    "elle ellos en er esa ese eso essa esse est esta este esto estou estoy está están estás et eux foi fue für "
    "ganz geht gli gracias grazie haben hacer hai hallo ho hola hoy ich ihm ihn ihr il ils im isso ist ja je jetzt "
    "kann kannst kein keine la las le les leur lo loro los lui mais mas mein meine merci mes meu mia mich minha "
    "mio mon muito muy más même nach nas ne nein nel nella ni nicht no noch non nous nur não o obrigada obrigado "
    "oder ohne onde ou où para pas pela pelo perché pero peut peux più por porque puede puedes puoi può quand "
    "quando que quello quem questa questo qui quiero quién quoi qué sa schon se sehr sein seine ser ses seu si "
    "sich sie sind so sobre sono sont su sua suis suo sus são sí ta también também te tem tengo tes ti toi tra "
    "très tu tuo tus um uma un una unas und une unos uns você vom von vor vous wann warum weil welche wenn wer "
    "werden wie wir wird wo y ya zu zum zur à ça è été être über "
)
_FUNCTION_WORDS = frozenset((_ENGLISH + _OTHERS).split())

# First match wins; what is left must keep three letters. Enough to join "reviews", "reviewed" and "reviewing".
_SUFFIXES = (("ies", "y"), ("sses", "ss"), ("ing", ""), ("edly", ""), ("ed", ""), ("es", ""), ("ly", ""), ("s", ""))


@lru_cache(maxsize=65_536)
def _word(token: str) -> str | None:
    """The term of one lower-cased token; None: it says nothing."""
    if token in _FUNCTION_WORDS:
        return None
    if not token.isascii():
        return token
    if len(token) == 1:
        return token if token.isdigit() else None
    if len(token) > 4 and token.isalpha():
        for suffix, replacement in _SUFFIXES:
            if token.endswith(suffix) and len(token) - len(suffix) >= 3 and not (suffix == "s" and token[-2] == "s"):
                return token[: -len(suffix)] + replacement
    return token


def words(text: str) -> list[str]:
    """The terms of `text`, in order, repeats included."""
    found = _TOKEN.findall(text.lower())
    if text.isascii() or not _CJK_ANY.search(text):
        return [term for token in found if (term := _word(token)) is not None]
    out: list[str] = []
    for token in found:
        if not _CJK_ANY.search(token):
            term = _word(token)
            if term is not None:
                out.append(term)
            continue
        for run in _CJK_RUN.findall(token):
            if not _CJK_ANY.match(run):
                term = _word(run)
                if term is not None:
                    out.append(term)
            elif len(run) == 1:
                out.append(run)
            else:
                out += [pair for i in range(len(run) - 1) if not _HIRAGANA.fullmatch(pair := run[i : i + 2])]
    return out


def pairs(terms: list[str]) -> list[str]:
    """Adjacent terms as one term each; a space joins them, so that none equals a word."""
    return [f"{a} {b}" for a, b in pairwise(terms)]


def capped(text: str) -> str:
    """`text` within MAX_QUERY_CHARS: its beginning and its end."""
    if len(text) <= MAX_QUERY_CHARS:
        return text
    return text[:_HEAD_CHARS] + "\n" + text[_HEAD_CHARS - MAX_QUERY_CHARS :]
