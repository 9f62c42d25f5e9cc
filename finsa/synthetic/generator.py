"""Generated Chinese finance texts: the labelled sample set and the tiny base model's pre-training corpus.

Labels follow from how a sentence is built (negation, contrast, comparison of numbers, irony ...), so they can be learnt
as rules; names and figures are drawn at random and carry no information.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Mapping
from typing import Final

import polars as pl

from finsa.synthetic import lexicon

LABELS: Final = ("利空", "中性", "利好")
DOMAINS: Final = ("news", "forum")
DEFAULT_DOMAINS: Final[Mapping[str, float]] = {"news": 0.6, "forum": 0.4}
DEFAULT_SHARES: Final[Mapping[str, Mapping[str, float]]] = {
    "news": {"利空": 0.13, "中性": 0.39, "利好": 0.48},
    "forum": {"利空": 0.46, "中性": 0.11, "利好": 0.43},
}
LENGTHS: Final[Mapping[str, tuple[int, int]]] = {"news": (20, 110), "forum": (8, 60)}

_SIGN: Final = {"利空": "-", "中性": "0", "利好": "+"}
_OPPOSITE: Final = {"+": "-", "-": "+", "0": "0"}
_ATTEMPTS: Final = 1000

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([a-z0-9.]+)([~!=+\-0]?)\}")


def _decimal(low: float, high: float, digits: int) -> Callable[[random.Random], str]:
    """Make a number slot. Args: bounds and decimal places. Returns: a function drawing the number as text."""
    return lambda rng: f"{rng.uniform(low, high):.{digits}f}"


_NUMBERS: Final[Mapping[str, Callable[[random.Random], str]]] = {
    "pct": _decimal(2, 48, 1),
    "pctint": _decimal(11, 68, 0),
    "smallpct": _decimal(0.3, 6, 1),
    "bigpct": _decimal(55, 380, 0),
    "yi": _decimal(1, 60, 1),
    "wan": _decimal(60, 9000, 0),
    "price": _decimal(3, 90, 2),
    "points": _decimal(2600, 3900, 1),
    "n": _decimal(3, 9, 0),
    "n2": _decimal(11, 15, 0),
    "year": _decimal(2003, 2022, 0),
    "born": _decimal(1985, 2001, 0),
    "date": lambda rng: f"{rng.randint(1, 12)}月{rng.randint(1, 28)}日",
}


class _Speaker:
    """One document's voice: fills patterns while keeping its company, persons and figures constant."""

    def __init__(self, rng: random.Random) -> None:
        """Draw the cast. Args: rng, source of all choices."""
        self.rng = rng
        self.bound: dict[str, str] = {}
        self.used: set[tuple[str, int]] = set()
        industry = rng.choice(list(lexicon.INDUSTRIES))
        endings, products = lexicon.INDUSTRIES[industry]
        self.bound |= {"ind": industry, "prod": rng.choice(products), "city": rng.choice(lexicon.CITIES)}
        stems = rng.sample(lexicon.NAME_FIRST, 4)
        names = [stem + rng.choice(lexicon.NAME_SECOND) for stem in stems]
        self.bound |= {"co": names[0] + rng.choice(endings), "co2": names[1] + rng.choice(endings)}
        self.bound |= {"nick": names[0] + rng.choice(("", *endings)), "nick2": names[1] + rng.choice(endings)}
        self.bound["broker"] = names[2] + rng.choice(("证券", "资本", "国际", "投资", "研究院"))
        self.bound["fund"] = names[3] + rng.choice(("成长混合A", "价值精选", "红利ETF", "优选基金", "稳健回报"))
        first, second = rng.sample(lexicon.SURNAMES, 2)
        given = "".join(rng.choice(lexicon.GIVEN) for _ in range(rng.choice((1, 2))))
        self.bound |= {"sur": first, "sur2": second, "person": first + given}
        self.bound["code"] = str(rng.randint(100000, 999999))
        self.renew()

    def renew(self) -> None:
        """Draw new figures for the comparisons and free the topics, the cast stays."""
        self.used.clear()
        for low_name, high_name, low, high, digits in lexicon.PAIRS:
            small = self.rng.uniform(low, high)
            self.bound[low_name] = f"{small:.{digits}f}"
            self.bound[high_name] = f"{small * self.rng.uniform(1.4, 2.5):.{digits}f}"

    def fill(self, pattern: str, sign: str) -> str:
        """Write a pattern out. Args: pattern in the lexicon's notation; sign of the label. Returns: the text."""
        while "[" in pattern:
            pattern = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), pattern)
        return _SLOT.sub(lambda match: self._slot(match[1], match[2], sign), pattern)

    def rule(self, name: str, sign: str) -> str:
        """Write out one of a rule's patterns. Args: name of the rule; sign of the label. Returns: the text."""
        patterns = lexicon.GRAMMAR[name]
        family = name.rstrip("+-")
        if family not in lexicon.DISTINCT:
            return self.fill(self.rng.choice(patterns), sign)
        # one text must not say of the same thing that it rose and that it fell
        free = [index for index in range(len(patterns)) if (family, index) not in self.used]
        index = self.rng.choice(free or list(range(len(patterns))))
        if index >= lexicon.DISTINCT[family]:
            self.used.add((family, index))
        return self.fill(patterns[index], sign)

    def _slot(self, name: str, mark: str, sign: str) -> str:
        """Fill one slot. Args: its name; its mark (see lexicon) or sign; current sign. Returns: text."""
        if name in self.bound:
            return self.bound[name]
        if name in _NUMBERS:
            return _NUMBERS[name](self.rng)
        if mark in ("~", "!") and sign == "0":
            sign = self.rng.choice("+-")
        sign = {"~": sign, "=": sign, "!": _OPPOSITE[sign], "": sign}.get(mark, mark)
        return self.rule(name + sign if mark else name, sign)


def _weighted(rng: random.Random, weights: Mapping[str, float]) -> str:
    """Draw a key. Args: rng; weights by key. Returns: one key."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _dress_news(speaker: _Speaker, main: str) -> str:
    """Put background around a news clause. Args: speaker; main, the deciding text. Returns: the whole text."""
    rng = speaker.rng
    lead = speaker.rule("lead", "0") if rng.random() < 0.4 else ""
    before = speaker.rule("before", "0") if rng.random() < 0.32 else ""
    after = speaker.rule("after", "0") if rng.random() < 0.6 else ""
    end = "" if main.endswith("？") or (not before and not after and rng.random() < 0.4) else "。"
    return before + lead + main + end + after


def _dress_forum(speaker: _Speaker, main: str) -> str:
    """Add the small talk of a forum. Args: speaker; main, the deciding text. Returns: the whole text."""
    rng = speaker.rng
    opening = speaker.rule("open", "0") if rng.random() < 0.4 else ""
    tail = speaker.rule("tail", "0") if rng.random() < 0.4 and main[-1] not in "？🙂" else ""
    return opening + main + tail


def _compose(speaker: _Speaker, domain: str, label: str) -> tuple[str, str]:
    """Write one text. Args: speaker; domain; label it has to carry. Returns: the text and its construction."""
    sign = _SIGN[label]
    dress = _dress_news if domain == "news" else _dress_forum
    kind = _weighted(speaker.rng, lexicon.KINDS[domain, sign])
    rule = f"{domain}.{kind}{sign}"
    low, high = LENGTHS[domain]
    for _ in range(_ATTEMPTS):
        main = speaker.rule(rule if rule in lexicon.GRAMMAR else f"{domain}.{kind}*", sign)
        text = dress(speaker, main)
        if low <= len(text) <= high:
            return text, kind
        speaker.renew()
    raise RuntimeError(f"no text of allowed length for {rule}")


def _quotas(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split a total by shares (largest remainder). Args: total; shares by key. Returns: whole numbers by key."""
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"shares must be non-negative and not all zero: {dict(shares)}")
    exact = {key: total * share / sum(shares.values()) for key, share in shares.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_rest = sorted(exact, key=lambda key: counts[key] - exact[key])
    for key in by_rest[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def _check(rows: int, domains: Mapping[str, float], shares: Mapping[str, Mapping[str, float]], noise: float) -> None:
    """Refuse arguments that cannot be met. Args: as in generate(). Raises: ValueError."""
    unknown = [d for d in (*domains, *shares) if d not in DOMAINS]
    unknown += [label for by_label in shares.values() for label in by_label if label not in LABELS]
    if unknown:
        raise ValueError(f"unknown domain or label: {unknown}")
    if rows < 0 or not 0 <= noise <= 1:
        raise ValueError(f"rows must be >= 0 and noise within 0..1, got {rows} and {noise}")


def generate(
    rows: int,
    seed: int,
    domains: Mapping[str, float] = DEFAULT_DOMAINS,
    imbalance: Mapping[str, Mapping[str, float]] | None = None,
    noise: float = 0.03,
) -> pl.DataFrame:
    """Generate the labelled sample set.

    Args:
        rows: number of rows.
        seed: the same seed gives the same frame on every machine.
        domains: share of the rows by domain.
        imbalance: class shares by domain, replacing the default of each domain named.
        noise: share of the rows whose label is replaced by a wrong one.
    Returns:
        a frame with id, text, label, domain, kind (construction) and noisy; the texts are unique.
    """
    shares = {**DEFAULT_SHARES, **(imbalance or {})}
    _check(rows, domains, shares, noise)
    rng = random.Random(f"finsa-generate:{seed}")
    plan = [
        (domain, label)
        for domain, count in _quotas(rows, domains).items()
        for label, part in _quotas(count, shares[domain]).items()
        for _ in range(part)
    ]
    rng.shuffle(plan)
    flipped = set(rng.sample(range(rows), round(rows * noise)))
    seen: set[str] = set()
    records: list[tuple[str, str, str, str, str, bool]] = []
    for index, (domain, label) in enumerate(plan):
        text, kind = _compose(_Speaker(rng), domain, label)
        while text in seen:
            text, kind = _compose(_Speaker(rng), domain, label)
        seen.add(text)
        shown = rng.choice([other for other in LABELS if other != label]) if index in flipped else label
        records.append((f"s{seed}-{index:06d}", text, shown, domain, kind, index in flipped))
    schema = dict.fromkeys(("id", "text", "label", "domain", "kind"), pl.String()) | {"noisy": pl.Boolean()}
    return pl.DataFrame(records, schema=schema, orient="row")


def _sentence(speaker: _Speaker, domain: str, label: str) -> str:
    """Write a text closed by a mark. Args: speaker; domain; label. Returns: the text."""
    text = _compose(speaker, domain, label)[0]
    return text if text[-1] in "。？！…😂🙂" else text + "。"


def _document(rng: random.Random) -> str:
    """Write one pre-training document. Args: rng. Returns: its text."""
    speaker = _Speaker(rng)
    form = _weighted(rng, lexicon.FORMS)
    domain, label = _weighted(rng, {"news": 0.5, "forum": 0.5}), rng.choice(LABELS)
    if form in ("task", "report"):
        domain = "news"
    if form == "single":
        return _compose(speaker, domain, label)[0]
    text = _sentence(speaker, domain, label)
    if form == "story":
        parts = [text]
        for _ in range(rng.randint(1, 3)):
            speaker.renew()
            parts.append(_sentence(speaker, domain, label))
        return "".join(parts)
    while form == "task" and speaker.bound["co"] not in text:
        text = _sentence(speaker, domain, label)
    if form == "task":
        # question and answer have to name the same figures
        speaker.bound |= {name: speaker.rule(name, "0") for name in ("period", "goodamt", "badamt")}
    speaker.bound["text"] = text
    speaker.bound["post"] = _sentence(speaker, "forum", label)
    # rules of thumb quote a conceding and a deciding clause, so they need a side
    sign = rng.choice("+-") if form == "sense" else _SIGN[label]
    return speaker.rule(form, sign).replace("\\n", "\n")


def _prefix_index(texts: Collection[str]) -> tuple[int, dict[str, list[str]]]:
    """Index texts by their beginning. Args: texts. Returns: the length of the key and the texts by key."""
    # a plain scan costs documents x texts; a key no longer than the shortest text finds every hit in one pass
    kept = sorted({text for text in texts if text})
    size = min((len(text) for text in kept), default=0)
    size = min(size, 8)
    index: dict[str, list[str]] = {}
    for text in kept:
        index.setdefault(text[:size], []).append(text)
    return size, index


def _contains(document: str, size: int, index: Mapping[str, list[str]]) -> bool:
    """Look for an indexed text. Args: document; key length and index. Returns: whether one occurs."""
    return any(
        document.startswith(text, start)
        for start in range(len(document) - size + 1)
        for text in index.get(document[start : start + size], ())
    )


def corpus(documents: int, seed: int, exclude: Collection[str] = ()) -> list[str]:
    """Generate the pre-training documents.

    Args:
        documents: how many.
        seed: the same seed gives the same list; the random stream differs from that of generate().
        exclude: texts (held-out rows) that no document may contain.
    Returns:
        unique documents in random order.
    """
    rng = random.Random(f"finsa-corpus:{seed}")
    size, index = _prefix_index(exclude)
    found: dict[str, None] = {}
    misses = 0
    while len(found) < documents:
        document = _document(rng)
        if document in found or (index and _contains(document, size, index)):
            misses += 1
            if misses > _ATTEMPTS + 20 * documents:
                raise RuntimeError("exclude leaves too few documents")
            continue
        found[document] = None
    return list(found)
