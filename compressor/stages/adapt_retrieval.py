"""Sequences with facts hidden in them and asked for at their end: what teaches a model to read far back.

Most tokens are foretold by the few before them, so that long documents alone hardly teach retrieval
(LongRoPE2, arXiv 2502.20082, section 3.2, makes the same point of evaluation). Some sequences therefore hold
made-up facts, and questions after them. Wordings, names and values differ from those of this package's
passkeys and needles (evals), so that these stay held out.

Legend: T tokens of a sequence.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Below this a sequence has no room for facts, their questions and something between.
LEAST_TOKENS = 256
# Facts of a sequence: a power of two, at most one for so many tokens.
_TOKENS_A_FACT = 1024
# Of a sequence that facts and questions may take.
_MOST_SHARE = 0.5
_REPEATED_SHARE = 0.3
_REPEATED = range(2, 7)  # sentences
_SENTENCE_CHARS = range(10, 120)
_SAMPLED_TOKENS = 3000
_NAMES = (
    *("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas"),
    *("Karin", "Leon", "Maria", "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tanja", "Viktor"),
)
_THINGS = ("locker", "ticket", "account", "ward", "badge", "suitcase", "cabin", "parcel", "garage", "archive")
_KINDS = ("red", "blue", "old", "new", "second", "hidden", "northern")
_LETTERS = "abcdefghjkmnpqrstuvwxyz0123456789"
# How a fact is told, and how it is asked for: s the subject, S the same at the beginning of a sentence.
_FORMS = (
    (" {s} is {v}. ", "\nWhat is {s}? {S} is"),
    ("\n{S} is {v}. Keep it in mind. {v} is {s}.\n", "\nWhat is {s}? {S} is"),
    ("\nPlease note that {s} is {v}.\n", "\nQuestion: what is {s}?\nAnswer:"),
    (" By the way, {s} was set to {v}. ", "\nNow tell me {s}. It is"),
    ("\n[{s}: {v}]\n", "\n[{s}:"),
    ("\nHere is something worth knowing: {s} is {v}; again, {v}.\n", "\nAs was said before, {s} is"),
)


class Retrieval:
    """Hides facts in a share of the sequences.

    Args:
        tokenizer: of the model.
        share: of the sequences, 0 to 1.
        seed: with a sequence's number it decides everything about it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, seed: int) -> None:
        self._tokenizer, self._share, self._seed = tokenizer, share, seed

    def hide(self, ids_T: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sequence as it is trained on, and which of its tokens are answers (bool [T]).

        None where it was left as it is: it is none of the share, or too short. ``number``: its place in the
        order of training; a sequence that comes again holds other facts.
        """
        rng = Random(f"{self._seed} {number}")
        if rng.random() >= self._share or len(ids_T) < LEAST_TOKENS:
            return ids_T, None
        return self._hidden(ids_T, rng)

    def _hidden(self, ids_T: torch.Tensor, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = len(ids_T)
        text = ids_T.tolist()
        if rng.random() < _REPEATED_SHARE:
            text = self._repeated(text, rng)
        count = 2 ** rng.randint(0, max(0, (tokens // _TOKENS_A_FACT).bit_length() - 1))
        facts, questions = self._facts(rng, count, most=int(tokens * _MOST_SHARE))
        rng.shuffle(questions)
        tail = sum(len(asked) + len(answer) for asked, answer in questions)
        room = tokens - tail - sum(map(len, facts))
        # The first token may be one that the tokenizer puts before a text: it stays first.
        cuts = sorted(1 + int((room - 1) * _depth(rng)) for _ in facts)
        made: list[int] = []
        for begin, cut, fact in zip([0, *cuts], cuts, facts, strict=False):
            made += text[begin:cut] + fact
        made += text[cuts[-1] : room]
        answers = [False] * len(made)
        for asked, answer in questions:
            made += asked + answer
            answers += [False] * len(asked) + [True] * len(answer)
        assert len(made) == tokens
        return ids_T.new_tensor(made), ids_T.new_tensor(answers).bool()

    def _facts(
        self, rng: Random, count: int, *, most: int
    ) -> tuple[list[list[int]], list[tuple[list[int], list[int]]]]:
        """Ids of up to ``count`` facts, and of a question and an answer to each; ``most`` tokens in all."""
        facts: list[list[int]] = []
        questions: list[tuple[list[int], list[int]]] = []
        subjects: set[str] = set()
        used = 0
        for _ in range(count):
            subject, value = _subject(rng), _value(rng)
            told, asked = rng.choice(_FORMS)
            if subject in subjects:
                continue
            subjects.add(subject)
            words = {"s": subject, "S": subject[0].upper() + subject[1:], "v": value}
            fact, question, answer = (
                self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
                for text in (told.format(**words), asked.format(**words), f" {value}")
            )
            used += len(fact) + len(question) + len(answer)
            if facts and used > most:
                break
            facts.append(fact)
            questions.append((question, answer))
        return facts, questions

    def _repeated(self, text: list[int], rng: Random) -> list[int]:
        """A few sentences of the text over and over; the text itself where it has too few."""
        sample = self._tokenizer.decode(text[:_SAMPLED_TOKENS], clean_up_tokenization_spaces=False)
        parts = (part.strip() for part in str(sample).replace("\n", " ").split("."))
        sentences = [f"{part}." for part in parts if len(part) in _SENTENCE_CHARS]
        few = rng.choice(_REPEATED)
        if len(sentences) < few:
            return text
        chosen = " ".join(rng.sample(sentences, few)) + " "
        ids = self._tokenizer.encode(chosen, add_special_tokens=False, verbose=False)
        return [text[0], *(ids * (len(text) // len(ids) + 1))[: len(text) - 1]]


def _depth(rng: Random) -> float:
    """0 for the beginning to 1; more often near both ends, which models find least."""
    even = rng.random()
    return rng.choice([even, even, even**4, 1 - even**4])


def _subject(rng: Random) -> str:
    name, thing, kind = rng.choice(_NAMES), rng.choice(_THINGS), rng.choice(_KINDS)
    return rng.choice(
        [
            f"{name}'s {thing} number",
            f"the number of the {thing} of {name}",
            f"the {thing} code of {name}",
            f"the {kind} {thing} code",
        ]
    )


def _value(rng: Random) -> str:
    """A number of four to seven digits, or six letters and digits."""
    if rng.random() < 0.8:
        return str(rng.randrange(1000, 10_000_000))
    return "".join(rng.choice(_LETTERS) for _ in range(6))
