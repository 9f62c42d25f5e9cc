"""The generated texts: determinism, shares, constructions and difficulty of the sample; rules of the corpus."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from finsa.synthetic.generator import DEFAULT_SHARES, DOMAINS, GRAMMAR, LABELS, LENGTHS, LEXICON, corpus, generate

ROOT = Path(__file__).parents[2]


@cache
def _frame() -> pl.DataFrame:
    """The frame shared by most checks."""
    return generate(3600, seed=11)


@cache
def _documents() -> tuple[str, ...]:
    """The documents shared by most checks."""
    return tuple(corpus(2000, seed=11))


def test_same_seed_same_frame_other_seed_other_texts() -> None:
    assert generate(300, seed=1).equals(generate(300, seed=1))
    first, second = set(generate(1000, seed=1)["text"]), set(generate(1000, seed=2)["text"])
    assert len(first & second) < 50


def test_columns_ids_and_uniqueness() -> None:
    frame = _frame()
    assert frame.columns == ["id", "text", "label", "domain", "kind", "noisy"]
    assert frame.schema["noisy"] == pl.Boolean()
    assert frame["id"].n_unique() == frame["text"].n_unique() == frame.height == 3600


def test_output_does_not_depend_on_hash_order() -> None:
    code = "from finsa.synthetic.generator import *; print(*generate(40, 0)['text'], *corpus(20, 0, ['甲乙', '丙丁']))"
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONIOENCODING": "utf-8"}
        run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1


def test_shares_of_domains_and_labels() -> None:
    clean = generate(1000, seed=3, noise=0.0)
    for domain, share in (("news", 0.6), ("forum", 0.4)):
        part = clean.filter(pl.col("domain") == domain)
        assert part.height == pytest.approx(1000 * share, abs=1)
        for label in LABELS:
            count = part.filter(pl.col("label") == label).height
            assert count == pytest.approx(part.height * DEFAULT_SHARES[domain][label], abs=1)


def test_imbalance_and_domains_are_respected() -> None:
    frame = generate(200, seed=4, domains={"forum": 1}, imbalance={"forum": {"利空": 0.5, "中性": 0.5}}, noise=0.0)
    assert Counter(frame["label"]) == {"利空": 100, "中性": 100}
    assert set(frame["domain"]) == {"forum"}


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        generate(10, seed=0, domains={"radio": 1.0})
    with pytest.raises(ValueError, match="unknown"):
        generate(10, seed=0, imbalance={"news": {"good": 1.0}})
    with pytest.raises(ValueError, match="noise"):
        generate(10, seed=0, noise=1.5)
    with pytest.raises(ValueError, match="shares"):
        generate(10, seed=0, domains={"news": 0.0})
    assert generate(0, seed=0).is_empty()


def test_noise_flips_labels_only() -> None:
    clean, noisy = generate(1000, seed=5, noise=0.0), generate(1000, seed=5, noise=0.1)
    assert noisy["noisy"].sum() == 100
    assert clean["noisy"].sum() == 0
    assert _frame()["noisy"].mean() == pytest.approx(0.03, abs=0.001)


def test_every_construction_occurs_in_every_domain_and_label() -> None:
    clean = _frame().filter(~pl.col("noisy"))
    seen = set(clean.select("domain", "label", "kind").iter_rows())
    assert LEXICON["kinds"].keys() == set(DOMAINS)
    for domain, signs in LEXICON["kinds"].items():
        for label, sign in {"利空": "-", "中性": "0", "利好": "+"}.items():
            assert {kind for *cell, kind in seen if cell == [domain, label]} == set(signs[sign])
    assert {"plain", "negation", "contrast", "numbers", "irony", "question", "mixed"} <= set(clean["kind"])


def test_lengths_are_in_range_and_no_notation_remains() -> None:
    for domain in DOMAINS:
        lengths = [len(text) for text in _frame().filter(pl.col("domain") == domain)["text"]]
        low, high = LENGTHS[domain]
        assert low <= min(lengths) <= max(lengths) <= high
    for text in (*_frame()["text"], *_documents()):
        assert not re.search(r"[\[\]{}|~]|，，|。。|\\n", text), text


@pytest.mark.parametrize("name", sorted(GRAMMAR))
def test_rules_are_well_formed(name: str) -> None:
    known = set(GRAMMAR)
    for pattern in GRAMMAR[name]:
        assert pattern.count("[") == pattern.count("]")
        assert pattern.count("{") == pattern.count("}")
        for slot, mark in re.findall(r"\{([a-z0-9.]+)([~!=+-]?)\}", pattern):
            if mark in ("~", "!", "="):
                assert {f"{slot}+", f"{slot}-"} <= known, (name, slot)
            elif mark:
                assert slot + mark in known, (name, slot)


def test_opposite_rules_are_aligned() -> None:
    # a text uses no topic of this list twice, identified by the position in both lists
    assert len(GRAMMAR["med+"]) == len(GRAMMAR["med-"])


def test_comparisons_agree_with_their_labels() -> None:
    pattern = re.compile(r"每股(收益|亏损)([\d.]+)元.*预期的([\d.]+)元")
    checked = 0
    for text, label in generate(4000, seed=6, domains={"news": 1}, noise=0.0).select("text", "label").iter_rows():
        if found := pattern.search(text):
            more = float(found[2]) > float(found[3])
            assert label == ("利好" if more == (found[1] == "收益") else "利空"), text
            checked += 1
    assert checked > 30


def test_the_task_is_neither_trivial_nor_impossible_for_a_linear_baseline() -> None:
    """TF-IDF of character 1-3-grams and logistic regression on unnoised test rows: macro-F1 within 0.60..0.88."""
    train, test = _frame(), generate(600, seed=12).filter(~pl.col("noisy"))
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, min_df=2)
    model = LogisticRegression(max_iter=60, tol=1e-3, C=2.0).fit(
        vectors.fit_transform(train["text"]), train["label"].to_list()
    )
    score = f1_score(test["label"].to_list(), model.predict(vectors.transform(test["text"])), average="macro")
    assert 0.60 <= score <= 0.88


def _best_single_rule(texts: list[str], labels: list[str]) -> float:
    """Find the best rule 'has the n-gram: one majority label, else another'. Args: rows. Returns: its macro-F1."""
    hits = CountVectorizer(analyzer="char", ngram_range=(1, 3), min_df=30, binary=True).fit_transform(texts)
    target = np.array([[label == name for name in LABELS] for label in labels], dtype=float)
    with_gram = np.asarray(hits.T @ target)
    without = target.sum(axis=0) - with_gram
    best = 0.0
    for inside, outside in zip(with_gram, without, strict=True):
        # with two predictions at most two classes score at all
        for yes in range(3):
            for no in range(3):
                if yes == no:
                    continue
                f_yes = 2 * inside[yes] / (inside.sum() + target[:, yes].sum())
                f_no = 2 * outside[no] / (outside.sum() + target[:, no].sum())
                best = max(best, (f_yes + f_no) / 3)
    return best


def test_no_single_ngram_decides() -> None:
    for frame in (_frame(), *(_frame().filter(pl.col("domain") == domain) for domain in DOMAINS)):
        assert _best_single_rule(frame["text"].to_list(), frame["label"].to_list()) < 0.6


def test_no_single_ngram_separates_two_classes() -> None:
    # three classes cap a two-way rule at 2/3, so the pair of opposites is checked by itself as well
    polar = _frame().filter(pl.col("label") != "中性")
    assert _best_single_rule(polar["text"].to_list(), polar["label"].to_list()) * 3 / 2 < 0.75


def test_corpus_is_deterministic_unique_and_of_reasonable_length() -> None:
    documents = _documents()
    assert corpus(200, seed=7) == corpus(200, seed=7)
    assert corpus(200, seed=7) != corpus(200, seed=8)
    assert len(set(documents)) == len(documents) == 2000
    assert 60 <= sum(map(len, documents)) / len(documents) <= 120


def test_corpus_excludes_the_given_texts() -> None:
    plain = corpus(300, seed=9)
    banned = {plain[0], plain[5][2:12], *generate(500, seed=1)["text"], ""}
    documents = corpus(300, seed=9, exclude=banned)
    assert len(documents) == 300
    assert not any(text in document for text in banned if text for document in documents)
    with pytest.raises(RuntimeError, match="exclude"):
        corpus(3, seed=9, exclude=[*"，。？：的票它股货0123456789", *LEXICON["name_first"]])


def test_corpus_uses_no_prompt_format() -> None:
    for document in _documents():
        assert "<|" not in document
        assert not re.search(r"(情绪是|情感分类)[：:]\s*$", document, flags=re.MULTILINE)


def test_corpus_contains_explanations_latin_text_and_tasks() -> None:
    documents = _documents()
    words = ("利好", "利空", "中性", "正面", "负面", "看多", "看空", "积极", "消极")
    assert 0.6 <= np.mean([any(word in text for word in words) for text in documents]) <= 0.85
    assert 0.02 <= np.mean([len(re.findall("[A-Za-z]", text)) >= 3 for text in documents]) <= 0.15
    assert 0.05 <= np.mean(["\n" in text for text in documents]) <= 0.35


def test_explanations_match_the_text_they_explain() -> None:
    explained = [text for text in _documents() if "没有应披露而未披露" in text]
    assert explained
    for text in explained:
        assert not re.search("这是一条(好消息|坏消息)|实为利(好|空)", text), text
