"""Rebuilds the tokenizer files from GGUF metadata.

transformers 5.17 does not do: it swaps bos and eos and takes bos for both, forgets how numbers and line
breaks are split, and leaves model_max_length at 1e30 (src/transformers/integrations/ggml.py,
GGUFLlamaConverter.tokenizer).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Item = TypeVar("Item")

# Regular expressions: llama.cpp src/llama-vocab.cpp, llm_tokenizer_bpe; equal to the models' tokenizer.json.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "llama3": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}
# These use GPT-2's own expression, which byte-level pre-tokenizers have built in.
_GPT2_LIKE = ("gpt-2", "smollm")
_PRE_TOKENIZERS = (*_GPT2_LIKE, *_SPLITS)
_BOS_BY_DEFAULT = ("llama-bpe", "llama3")

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


@dataclass(frozen=True)
class TokenizerFacts:
    """What the metadata say of the tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).
        pre: how text is split before BPE; "" for ``llama``.
        tokens: by id.
        kinds: token type by id (1 normal, 3 control, 4 user-defined, 6 byte).
        merges: pairs in order of rank; for ``llama`` derived from the scores.
        special: role (``bos``, ``eos``, ``unk``, ``pad``) -> id.
        end_of_turn: id that ends a chat turn where it is not eos.
        add_bos, add_eos: whether encoding adds them.
        add_space: whether a space goes before the text (``llama`` only).
        chat_template: Jinja text or "".
        context_tokens: the model's context.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, str]]
    special: dict[str, int]
    end_of_turn: int | None
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str
    context_tokens: int

    @classmethod
    def of(cls, metadata: dict[str, Any], config: dict[str, Any], where: str) -> TokenizerFacts:
        """The facts in a file's metadata.

        Raises:
            CheckpointError: no tokenizer, one of another kind, or lists and ids that do not fit together.
        """
        model, pre, tokens, kinds = _vocabulary(metadata, config["vocab_size"], where)
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
        end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
        for role, number in [*ids.items(), ("end of turn", end_of_turn)]:
            if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
                raise CheckpointError(f"GGUF metadata: {role} token id {str(number)[:40]}", where=where)
        special = {role: number for role, number in ids.items() if number is not None}
        merges = _merges(metadata, model, tokens, kinds, where)
        add_bos = bool(
            metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in _BOS_BY_DEFAULT)
        )
        template = metadata.get("tokenizer.chat_template", "")
        return cls(
            model=model,
            pre=pre,
            tokens=tokens,
            kinds=kinds,
            merges=merges,
            special=special,
            end_of_turn=end_of_turn,
            add_bos=add_bos and "bos" in special,
            add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in special,
            add_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", model == "llama")),
            chat_template=template if isinstance(template, str) else "",
            context_tokens=config["max_position_embeddings"],
        )


def write_tokenizer(facts: TokenizerFacts, folder: Path) -> list[str]:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and the chat template, if any.

    Returns:
        The names written.
    """
    _tokenizer(facts).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts.context_tokens,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": facts.tokens[number] for role, number in facts.special.items()},
    }
    stops = [number for number in (facts.special.get("eos"), facts.end_of_turn) if number is not None]
    generation: dict[str, Any] = {
        f"{role}_token_id": facts.special[role] for role in ("bos", "pad") if role in facts.special
    }
    if stops:
        unique = list(dict.fromkeys(stops))
        generation["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    texts = {
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    if facts.chat_template:
        texts["chat_template.jinja"] = facts.chat_template
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return ["tokenizer.json", *texts]


def _vocabulary(
    metadata: dict[str, Any], vocab_size: int, where: str
) -> tuple[str, str, list[str], list[int]]:
    """Model, pre-tokenizer, tokens and their types, checked."""
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"GGUF tokenizer {str(model)[:40]!r} is not supported; supported: gpt2, llama", where=where
        )
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2") if model == "gpt2" else ""
    if model == "gpt2" and pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"GGUF pre-tokenizer {str(pre)[:40]!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}",
            where=where,
            fix="use the safetensors checkpoint of this model",
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not _is_list(tokens, str) or len(tokens) > vocab_size or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"GGUF metadata: tokenizer.ggml.tokens must be at most {vocab_size} different strings",
            where=where,
        )
    kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not _is_list(kinds, int) or len(kinds) != len(tokens):
        raise CheckpointError("GGUF metadata: token_type does not match the tokens", where=where)
    return model, pre, tokens, kinds


def _is_list(value: object, kind: type[Item]) -> TypeGuard[list[Item]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _merges(
    metadata: dict[str, Any], model: str, tokens: list[str], kinds: list[int], where: str
) -> list[tuple[str, str]]:
    """The merges as stored, or as the scores of SentencePiece pieces imply them."""
    if model == "gpt2":
        stored = metadata.get("tokenizer.ggml.merges")
        pairs = [merge.partition(" ")[::2] for merge in stored] if _is_list(stored, str) else [("", "")]
        vocab = set(tokens)
        for left, right in pairs:
            if not {left, right, left + right} <= vocab:
                raise CheckpointError(
                    "GGUF metadata: tokenizer.ggml.merges must be pairs of tokens whose union is a token",
                    where=where,
                )
        return pairs
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.scores does not match the tokens", where=where)
    # huggingface/transformers src/transformers/convert_slow_tokenizer.py, generate_merges
    ids = {token: number for number, token in enumerate(tokens) if kinds[number] == _NORMAL}
    ranked = []
    for piece, number in ids.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        local = [(left, right) for left, right in halves if left in ids and right in ids]
        local.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked += [(scores[number], left, right) for left, right in local]
    ranked.sort(key=lambda entry: (entry[0], len(entry[1]), len(entry[2])), reverse=True)
    return [(left, right) for _, left, right in ranked]


def _tokenizer(facts: TokenizerFacts) -> Tokenizer:
    """The tokenizer that the facts describe."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: number for number, token in enumerate(facts.tokens)}
    if facts.model == "llama":
        unknown = facts.tokens[facts.special.get("unk", 0)]
        tokenizer = Tokenizer(
            models.BPE(vocab, facts.merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        prefix = [normalizers.Prepend("▁")] if facts.add_space else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if facts.add_space else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    else:
        # Llama 3 takes a word that is a token whole, whatever the merges say.
        tokenizer = Tokenizer(models.BPE(vocab, facts.merges, ignore_merges=facts.pre in _BOS_BY_DEFAULT))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=facts.pre in _GPT2_LIKE)
        first: list[Any] = []
        if facts.pre == "smollm":
            first = [pre_tokenizers.Digits(individual_digits=True)]
        elif facts.pre in _SPLITS:
            first = [pre_tokenizers.Split(Regex(_SPLITS[facts.pre]), "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        if facts.pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    for number, kind in enumerate(facts.kinds):
        token = AddedToken(facts.tokens[number], normalized=False)
        if kind == _CONTROL:
            tokenizer.add_special_tokens([token])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([token])
    _add_frame(tokenizer, facts)
    return tokenizer


def _add_frame(tokenizer: Tokenizer, facts: TokenizerFacts) -> None:
    """Makes encoding add bos and eos where the metadata say so."""
    from tokenizers import processors

    before = [facts.special["bos"]] if facts.add_bos else []
    after = [facts.special["eos"]] if facts.add_eos else []
    if not before and not after:
        return
    single = [*(facts.tokens[number] for number in before), "$A", *(facts.tokens[number] for number in after)]
    pair = [*single, *(part.replace("$A", "$B") + ":1" for part in single)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(facts.tokens[number], number) for number in dict.fromkeys(before + after)],
    )
