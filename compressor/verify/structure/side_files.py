"""Files beside the weights: tokenizer, generation config, manifest."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from compressor.checkpoint.folder import file_inside
from compressor.errors import CheckpointError
from compressor.progress import Progress
from compressor.report.manifest import MANIFEST_FILE, RUN_FILES, check_manifest
from compressor.verify.base import Check
from compressor.verify.structure.contents import Contents, json_object
from compressor.verify.structure.findings import Findings, skipped

# Any one of them is a vocabulary.
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v[0-9]*", "tekken.json", "*.tiktoken"),
    *("spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)
_JSON_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "tekken.json", "chat_template.json", "generation_config.json"),
)


def check_tokenizer(stored: Contents) -> Check:
    """The check ``tokenizer``: a vocabulary is there; its files and generation_config.json can be read."""
    found = Findings("tokenizer")
    for name in _JSON_FILES:
        if name in stored.names:
            try:
                json_object(stored.folder, name)
            except CheckpointError as error:
                found.add(f"{error.what}: copy it from the source")
    vocabularies = [name for name in stored.names if has_vocabulary([name])]
    for name in vocabularies:
        try:
            file_inside(stored.folder, name, "")
        except CheckpointError as error:
            found.add(f"{error.what}: copy it from the source")
    if not vocabularies and not found:
        return skipped("tokenizer", "no tokenizer in the folder; engines need one, or a --tokenizer")
    return found.result(f"{', '.join(vocabularies)}")


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether any of the files is a tokenizer's vocabulary."""
    return any(fnmatchcase(name, one) for name in names for one in _VOCABULARIES)


def check_files(stored: Contents, progress: Progress) -> Check:
    """The check ``manifest``: every file is as the manifest says, byte for byte."""
    found = Findings("manifest")
    if MANIFEST_FILE not in stored.names:
        return skipped("manifest", f"no {MANIFEST_FILE}: nothing says what the files must contain")
    described = 0
    try:
        for difference in check_manifest(stored.folder, progress=progress):
            name, _, fault = difference.partition(": ")
            # Engines do not read these; a verification that was killed may have left new ones.
            if name in RUN_FILES:
                described += 1
            else:
                found.add(f"{fault}; the files are not those that were exported", name)
    except CheckpointError as error:
        found.add(error.what)
    edited = f", but for {described} that describe the run" if described else ""
    return found.result(f"every file has the size and sha256 that it was exported with{edited}")
