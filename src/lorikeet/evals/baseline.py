"""The classical baseline beside every classification task: TF-IDF and logistic regression."""

from __future__ import annotations

from collections.abc import Sequence


def tfidf(train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str], seed: int) -> list[str]:
    """Labels that word (1-2) TF-IDF with logistic regression (scikit-learn) gives to `test_texts`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=2000, random_state=seed),
    )
    model.fit(list(train_texts), list(train_labels))
    return [str(label) for label in model.predict(list(test_texts))]
