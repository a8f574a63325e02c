"""What `text_toxicity` says about a text, and that nothing but the pinned files is ever unpickled."""

import subprocess
import sys
from pathlib import Path

import pytest

from filters import text_toxicity
from filters.base import Batch
from filters.text_toxicity import TextToxicity
from pairs.errors import PairmillError


def probabilities(*texts: str | None, max_chars: int = 5000) -> list[float | None]:
    batch = Batch([str(i) for i in range(len(texts))], {"text": [*texts]})
    return list(TextToxicity(max_chars=max_chars).score(batch)["probability"])


def test_abuse_is_told_from_captions() -> None:
    captions = ["a red boat on a quiet lake", "two dogs run across a meadow", "portrait of a woman in a white dress"]
    abuse = ["you are a fucking idiot", "shut up you stupid bitch"]
    found = probabilities(*captions, *abuse)
    assert max(found[:3]) < 0.3 and min(found[3:]) > 0.95  # type: ignore[type-var]


def test_it_is_the_packages_own_answer() -> None:
    from profanity_check import predict_prob

    texts = ["a red boat", "what the hell", "damn good cake"]
    assert probabilities(*texts) == pytest.approx(predict_prob(texts).tolist(), abs=1e-9)


def test_blank_texts_have_none_and_long_ones_are_cut() -> None:
    assert probabilities(None, "", " \n") == [None] * 3
    insult = "you are a fucking idiot"
    assert probabilities("boat " * 100 + insult, max_chars=500) == probabilities("boat " * 100)


def test_changed_files_are_never_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    text_toxicity._load.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"\x80\x04not the model")
    monkeypatch.setattr("joblib.load", lambda *_: pytest.fail("it was unpickled"))
    with pytest.raises(PairmillError, match="with sha256"):
        probabilities("a boat")


def test_neither_planning_nor_an_empty_batch_imports_what_takes_seconds() -> None:
    program = (
        "import sys; from filters.lookup import load_filter; from filters.base import Batch, fingerprint_of\n"
        "one = load_filter('text_toxicity', {}); fingerprint_of('text_toxicity', one, {})\n"
        "one.score(Batch(['a'], {'text': [None]}))\n"
        "assert not {'sklearn', 'joblib', 'profanity_check'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
