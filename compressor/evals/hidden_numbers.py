"""Numbers hidden in one long text and asked for at its end: the needles of LongRoPE2's perplexity.

Most tokens of a document are foretold by the few before them, so that its perplexity hardly says whether a
model reads far back; numbers that stand far back and nowhere else do (arXiv 2502.20082, section 3.2). All
numbers of a text are asked for one after the other, so that one forward pass is enough for all depths.

Legend: T tokens, A those of the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_NAMES = ("amber", "crimson", "ivory", "cobalt", "emerald", "silver", "violet", "scarlet")
MOST_NUMBERS = len(_NAMES)
_HIDDEN = "\n\nThe {name} code is {number}. Remember it.\n\n"
_ASKED = "\n\nThe {name} code is"
_ANSWER = " {number}"


@dataclass(frozen=True)
class NumberText:
    """Attributes:
    ids_T: the text.
    answer_A: indices of the answers' tokens in it.
    """

    ids_T: torch.Tensor
    answer_A: torch.Tensor


def hide_numbers(
    tokenizer: PreTrainedTokenizerBase, text_T: torch.Tensor, *, count: int, seed: int
) -> NumberText:
    """The text, as long as before, with ``count`` numbers in it and questions at its end in another order.

    Each lies in the middle of one of ``count`` equal parts; the end of the text makes room.

    Raises:
        UserError: there is no room.
    """
    import torch

    assert 1 <= count <= MOST_NUMBERS
    generator = torch.Generator().manual_seed(seed)
    numbers = (10_000 + torch.randint(90_000, (count,), generator=generator)).tolist()

    def ids(text: str) -> torch.Tensor:
        return text_T.new_tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    told = [ids(_HIDDEN.format(name=_NAMES[index], number=numbers[index])) for index in range(count)]
    tail: list[torch.Tensor] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for index in torch.randperm(count, generator=generator).tolist():
        asked, answer = ids(_ASKED.format(name=_NAMES[index])), ids(_ANSWER.format(number=numbers[index]))
        spans.append((length + len(asked), length + len(asked) + len(answer)))
        tail += [asked, answer]
        length += len(asked) + len(answer)
    room = len(text_T) - length - sum(map(len, told))
    if room < count:
        raise UserError(f"a text of {len(text_T)} tokens has no room for {count} numbers and their questions")
    cuts = [round((index + 0.5) / count * room) for index in range(count)]
    parts = []
    for before, cut, hidden in zip([0, *cuts], cuts, told, strict=False):
        parts += [text_T[before:cut], hidden]
    parts.append(text_T[cuts[-1] : room])
    ids_T = torch.cat([*parts, *tail])
    begin = len(ids_T) - length
    answer_A = torch.cat([torch.arange(begin + first, begin + last) for first, last in spans])
    return NumberText(ids_T, answer_A)
