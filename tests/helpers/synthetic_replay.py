"""Answers of a synthetic document, found by a dictionary that is independent of how it was drawn."""

from infini_train.synthetic import Vocabulary

VOCABULARY = Vocabulary(keys=12, values=7, noise=5)


def words(document, vocabulary: Vocabulary = VOCABULARY) -> list[str]:
    names = vocabulary.names()
    return [names[token] for token in document.tokens_T]


def tellings(text: list[str]) -> list[tuple[str, list[int]]]:
    """(key, places of its value's words) in order: pairs, and passkeys with all their digits."""
    found = []
    for at, word in enumerate(text):
        if word[0] == "k":
            assert text[at + 1][0] == "v", "a key has a value"
            found.append((word, [at + 1]))
        elif word == "passkey":
            places = [at + 1]
            while text[places[-1] + 1][0] == "d":
                places.append(places[-1] + 1)
            found.append((word, places))
    return found


def replay(text: list[str], size: int, window: int | None = None) -> dict[int, tuple[bool, bool]]:
    """For each answer: whether only the memory can know it with segments of `size` and attention to the last `window`
    tokens, and whether it is the latest of several values. An answer is a value that equals the last one told for its
    key."""
    history: dict[str, list[tuple[tuple[str, ...], list[int]]]] = {}
    answers = {}
    for key, places in tellings(text):
        value = tuple(text[p] for p in places)
        before = history.setdefault(key, [])
        if before and before[-1][0] == value:
            several = len({told for told, _ in before}) > 1
            for i, place in enumerate(places):
                asked = place - 1
                told = [p[i] for _, p in before]
                if window is None:
                    seen = any(at // size == asked // size for at in told)
                else:
                    seen = any(at > asked - window and at // size >= asked // size - 1 for at in told)
                answers[place] = (not seen, several)
        before.append((value, places))
    return answers
