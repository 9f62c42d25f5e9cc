"""Generated Chinese finance texts: the labeled sample set and the tiny base model's pre-training corpus.

Labels follow from sentence constructions (negation, contrast, comparison of numbers, irony ...), so they can be learned
as rules; names and figures are drawn at random and are independent of the label. Words and patterns are in
``lexicon.yaml``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import polars as pl
import yaml

LABELS: Final = ("利空", "中性", "利好")
DOMAINS: Final = ("news", "forum")
DEFAULT_DOMAINS: Final[Mapping[str, float]] = {"news": 0.6, "forum": 0.4}
DEFAULT_SHARES: Final[Mapping[str, Mapping[str, float]]] = {
    "news": {"利空": 0.13, "中性": 0.39, "利好": 0.48},
    "forum": {"利空": 0.46, "中性": 0.11, "利好": 0.43},
}
LENGTHS: Final[Mapping[str, tuple[int, int]]] = {"news": (20, 110), "forum": (8, 60)}

LEXICON: Final[Mapping[str, Any]] = yaml.load(
    Path(__file__).with_name("lexicon.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
)
GRAMMAR: Final[Mapping[str, list[str]]] = {
    name: rule.splitlines() if isinstance(rule, str) else rule for name, rule in LEXICON["grammar"].items()
}
# Numbers drawn anew wherever they occur: bounds and decimal places.
_NUMBERS: Final[Mapping[str, tuple[float, float, int]]] = {
    "pct": (2, 48, 1),
    "pctint": (11, 68, 0),
    "smallpct": (0.3, 6, 1),
    "bigpct": (55, 380, 0),
    "yi": (1, 60, 1),
    "wan": (60, 9000, 0),
    "price": (3, 90, 2),
    "points": (2600, 3900, 1),
    "n": (3, 9, 0),
    "n2": (11, 15, 0),
    "year": (2003, 2022, 0),
    "born": (1985, 2001, 0),
}
_SIGN: Final = {"利空": "-", "中性": "0", "利好": "+"}
_OPPOSITE: Final = {"+": "-", "-": "+", "0": "0"}
_ATTEMPTS: Final = 1000
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([a-z0-9.]+)([~!=+\-0]?)\}")

# FinTeamExperts trains macro, micro and quantitative analysts on corpora that are not public. Generated documents are
# divided by a simple rule instead: those about industries, boards and indices are macro; of the rest, those dense in
# figures are quant, and the others are micro.
_MACRO = re.compile("行业|板块|政策|指数|早报|周报")
_DENSE = 0.05  # share of digits
_DRAWN_PER_ROLE = 5  # documents drawn initially per requested document of a role; about a third have that role


class _Speaker:
    """The state of one document: fills patterns while keeping its company, persons and figures constant.

    Args:
        rng: source of all random choices.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: set[tuple[str, int]] = set()
        industry = rng.choice(list(LEXICON["industries"]))
        endings, products = (LEXICON["industries"][industry][words] for words in ("endings", "products"))
        self.bound = {"ind": industry, "prod": rng.choice(products), "city": rng.choice(LEXICON["cities"])}
        names = [stem + rng.choice(LEXICON["name_second"]) for stem in rng.sample(LEXICON["name_first"], 4)]
        self.bound |= {"co": names[0] + rng.choice(endings), "co2": names[1] + rng.choice(endings)}
        self.bound |= {"nick": names[0] + rng.choice(("", *endings)), "nick2": names[1] + rng.choice(endings)}
        self.bound["broker"] = names[2] + rng.choice(("证券", "资本", "国际", "投资", "研究院"))
        self.bound["fund"] = names[3] + rng.choice(("成长混合A", "价值精选", "红利ETF", "优选基金", "稳健回报"))
        first, second = rng.sample(LEXICON["surnames"], 2)
        given = "".join(rng.choice(LEXICON["given"]) for _ in range(rng.choice((1, 2))))
        self.bound |= {"sur": first, "sur2": second, "person": first + given}
        self.bound["code"] = str(rng.randint(100000, 999999))
        self.renew()

    def renew(self) -> None:
        """Draw new figures for the comparisons and make all topics available again; the cast stays."""
        self.used.clear()
        for low_name, high_name, low, high, digits in LEXICON["pairs"]:
            small = self.rng.uniform(low, high)
            self.bound[low_name] = f"{small:.{digits}f}"
            self.bound[high_name] = f"{small * self.rng.uniform(1.4, 2.5):.{digits}f}"

    def fill(self, pattern: str, sign: str) -> str:
        """Expand a pattern of the lexicon with the sign of the label."""
        while "[" in pattern:
            pattern = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), pattern)
        return _SLOT.sub(lambda match: self._slot(match[1], match[2], sign), pattern)

    def rule(self, name: str, sign: str) -> str:
        """Expand one of a rule's patterns."""
        patterns, family, recurring = GRAMMAR[name], name.rstrip("+-"), LEXICON["distinct"]
        if family not in recurring:
            return self.fill(self.rng.choice(patterns), sign)
        # One text must not say of the same thing that it rose and that it fell.
        free = [index for index in range(len(patterns)) if (family, index) not in self.used]
        index = self.rng.choice(free or list(range(len(patterns))))
        if index >= recurring[family]:
            self.used.add((family, index))
        return self.fill(patterns[index], sign)

    def _slot(self, name: str, mark: str, sign: str) -> str:
        if name in self.bound:
            return self.bound[name]
        if name == "date":
            return f"{self.rng.randint(1, 12)}月{self.rng.randint(1, 28)}日"
        if name in _NUMBERS:
            low, high, digits = _NUMBERS[name]
            return f"{self.rng.uniform(low, high):.{digits}f}"
        if mark in ("~", "!") and sign == "0":
            sign = self.rng.choice("+-")
        sign = {"~": sign, "=": sign, "!": _OPPOSITE[sign], "": sign}.get(mark, mark)
        return self.rule(name + sign if mark else name, sign)


def _weighted(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _compose(speaker: _Speaker, domain: str, label: str) -> tuple[str, str]:
    """Write one text of a domain with a label: the deciding clause, and around it background or small talk.

    Returns:
        The text and the kind of its construction.
    """
    rng, sign = speaker.rng, _SIGN[label]
    kind = _weighted(rng, LEXICON["kinds"][domain][sign])
    rule = f"{domain}.{kind}{sign}"
    low, high = LENGTHS[domain]
    for _ in range(_ATTEMPTS):
        text = speaker.rule(rule if rule in GRAMMAR else f"{domain}.{kind}*", sign)
        if domain == "news":
            lead = speaker.rule("lead", "0") if rng.random() < 0.4 else ""
            before = speaker.rule("before", "0") if rng.random() < 0.32 else ""
            after = speaker.rule("after", "0") if rng.random() < 0.6 else ""
            end = "" if text.endswith("？") or (not before and not after and rng.random() < 0.4) else "。"
            text = before + lead + text + end + after
        else:
            opening = speaker.rule("open", "0") if rng.random() < 0.4 else ""
            text = opening + text + (speaker.rule("tail", "0") if rng.random() < 0.4 and text[-1] not in "？🙂" else "")
        if low <= len(text) <= high:
            return text, kind
        speaker.renew()
    raise RuntimeError(f"no text of allowed length for {rule}")


def _quotas(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split a total in proportion to shares, by the largest remainders."""
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"shares must be non-negative and not all zero: {dict(shares)}")
    exact = {key: total * share / sum(shares.values()) for key, share in shares.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_rest = sorted(exact, key=lambda key: counts[key] - exact[key])
    for key in by_rest[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def generate(
    rows: int,
    seed: int,
    domains: Mapping[str, float] = DEFAULT_DOMAINS,
    imbalance: Mapping[str, Mapping[str, float]] | None = None,
    noise: float = 0.03,
    days: int | None = None,
    drift: float = 0.0,
) -> pl.DataFrame:
    """Generate the labeled sample set.

    Args:
        rows: number of rows.
        seed: the same seed gives the same frame on every machine.
        domains: share of the rows by domain.
        imbalance: class shares by domain, replacing the defaults of the given domains.
        noise: share of the rows whose label is replaced by a wrong one.
        days: the rows have times within so many days; None: no times.
        drift: share of the rows, by kind, whose bullish and bearish labels are exchanged in the last third of the days.

    Returns:
        Columns id, text, label, domain, kind (of construction) and noisy; with days also time. The texts are unique.

    Raises:
        ValueError: for invalid arguments.
    """
    shares = {**DEFAULT_SHARES, **(imbalance or {})}
    unknown = [domain for domain in (*domains, *shares) if domain not in DOMAINS]
    unknown += [label for by_label in shares.values() for label in by_label if label not in LABELS]
    if unknown:
        raise ValueError(f"unknown domain or label: {unknown}")
    if rows < 0 or not 0 <= noise <= 1:
        raise ValueError(f"rows must be >= 0 and noise within 0..1, got {rows} and {noise}")
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
        noisy = index in flipped
        written = rng.choice([other for other in LABELS if other != label]) if noisy else label
        records.append((f"s{seed}-{index:06d}", text, written, domain, kind, noisy))
    schema = dict.fromkeys(("id", "text", "label", "domain", "kind"), pl.String()) | {"noisy": pl.Boolean()}
    frame = pl.DataFrame(records, schema=schema, orient="row")
    return frame if days is None else _with_times(frame, days, drift, random.Random(f"finsa-times:{seed}"))


def _with_times(frame: pl.DataFrame, days: int, drift: float, rng: random.Random) -> pl.DataFrame:
    """Add times, and exchange late labels of kinds that together have about a share `drift` of the rows."""
    sizes = frame.group_by("kind").len().sort("kind").rows()
    rng.shuffle(sizes)
    changed, total = list[str](), 0
    for kind, size in sizes:
        if total + size / 2 <= drift * frame.height:
            changed.append(kind)
            total += size
    times = [datetime(2023, 1, 1) + timedelta(days=days * rng.random()) for _ in range(frame.height)]
    late = pl.Series([time >= datetime(2023, 1, 1) + timedelta(days=days * 2 / 3) for time in times], dtype=pl.Boolean)
    exchanged = pl.col("label").replace({LABELS[0]: LABELS[2], LABELS[2]: LABELS[0]})
    label = pl.when(pl.lit(late) & pl.col("kind").is_in(changed)).then(exchanged).otherwise("label").alias("label")
    return frame.with_columns(label, pl.Series("time", [time.isoformat(timespec="seconds") for time in times]))


def _sentence(speaker: _Speaker, domain: str, label: str) -> str:
    text = _compose(speaker, domain, label)[0]
    return text if text[-1] in "。？！…😂🙂" else text + "。"


def _document(rng: random.Random) -> str:
    """Write one pre-training document."""
    speaker = _Speaker(rng)
    form = _weighted(rng, LEXICON["forms"])
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
    if form == "task":
        while speaker.bound["co"] not in text:
            text = _sentence(speaker, domain, label)
        # Question and answer have to name the same figures.
        speaker.bound |= {name: speaker.rule(name, "0") for name in ("period", "goodamt", "badamt")}
    speaker.bound["text"] = text
    speaker.bound["post"] = _sentence(speaker, "forum", label)
    # Rules of thumb quote a conceding and a deciding clause, so they need a side.
    sign = rng.choice("+-") if form == "sense" else _SIGN[label]
    return speaker.rule(form, sign).replace("\\n", "\n")


def role_of(document: str) -> str:
    """The analyst role of a document: ``macro``, ``quant`` or ``micro``."""
    if _MACRO.search(document):
        return "macro"
    return "quant" if sum(letter.isdigit() for letter in document) >= _DENSE * len(document) else "micro"


def corpus(documents: int, seed: int, exclude: Collection[str] = (), role: str | None = None) -> list[str]:
    """Generate the pre-training documents.

    Args:
        documents: number of documents.
        seed: the same seed gives the same list; the random stream differs from that of `generate`.
        exclude: texts (held-out rows) that no document may contain.
        role: macro, micro or quant: keep only documents of that role; None: keep all. Lists of different roles have
            no document in common.

    Returns:
        Unique documents in random order.
    """
    if role is not None:
        of_role, number = list[str](), _DRAWN_PER_ROLE * documents
        while len(of_role) < documents:  # a larger draw starts with the documents of a smaller one
            of_role = [document for document in corpus(number, seed, exclude) if role_of(document) == role]
            number *= 2
        return of_role[:documents]
    rng = random.Random(f"finsa-corpus:{seed}")
    # A plain scan costs documents x texts. A key no longer than the shortest text finds every hit in one pass.
    texts = sorted({text for text in exclude if text})
    size = min(8, min(map(len, texts), default=0))
    by_start: dict[str, list[str]] = {}
    for text in texts:
        by_start.setdefault(text[:size], []).append(text)
    unique: dict[str, None] = {}
    misses = 0
    while len(unique) < documents:
        document = _document(rng)
        starts = range(len(document) - size + 1) if texts else ()
        if document in unique or any(
            document.startswith(text, start)
            for start in starts
            for text in by_start.get(document[start : start + size], ())
        ):
            misses += 1
            if misses > _ATTEMPTS + 20 * documents:
                raise RuntimeError("exclude leaves too few documents")
            continue
        unique[document] = None
    return list(unique)
