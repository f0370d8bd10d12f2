"""Every kind of fault names its file, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.recipe.faults import MAX_SHOWN, RecipeFaults
from compressor.recipe.load import load_recipe
from compressor.recipe.model import RESERVED
from tests.recipe.conftest import SMALL, Faults, Write

HEAD = "schema_version: 1\nmodel: {source: m.gguf}\n"


@pytest.mark.parametrize(
    "text, where, message",
    [
        # the shape of the file
        ("", "1:1", "the recipe is empty"),
        ("# only a comment\n", "1:1", "the recipe is empty"),
        ("- a\n", "1:1", "a recipe is a map of keys"),
        ("\n  text\n", "2:3", "a recipe is a map of keys"),
        ("a: [1\nb: 2\n", "2:2", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "2:1", "not valid YAML"),
        ('ä: "\\q"\n', "1:6", "not valid YAML"),
        ("a: 1\nb: \x07\n", "2:4", "character U+0007"),
        (SMALL + "---\na: 1\n", "4:1", "only one YAML document"),
        # anchors, aliases, tags, keys
        ("a: &x 1\n", "1:4", "anchors and aliases are not allowed"),
        ("a: *x\n", "1:4", "anchors and aliases are not allowed"),
        ("match: *.q_proj\n", "1:9", "put text that begins with * or & in quotes"),
        (SMALL + "seed: !!int 3\n", "4:7", "tags are not allowed: tag:yaml.org,2002:int"),
        (SMALL + "name: !!python/object:os.system x\n", "4:7", "tags are not allowed"),
        (SMALL + "? [a, b]\n: 1\n", "4:3", "a key must be plain text"),
        (SMALL + 'name: "a\\0b"\n', "4:7", "control character"),
        (SMALL + 'name: "\\ud800"\n', "4:7", "half of a surrogate pair"),
        (SMALL + '"a\\0b": 1\n', "4:1", "a key holds a control character"),
        # keys
        (SMALL + "seed: 1\nseed: 2\n", "5:1", "key 'seed' is here twice; first at r.yaml:4:1"),
        (SMALL + "wieghts: 1\n", "4:1", "unknown key 'wieghts' -> did you mean 'weights'?"),
        (SMALL + "zzz: 1\n", "4:1", "known here: adapters, calibration, context, drafts, evaluate, export,"),
        (HEAD + "weights:\n  scheme: int4\n  sovler: rtn\n", "5:3", "did you mean 'solver'?"),
        (HEAD + "weights:\n  scheme: {kind: int4, group: 64}\n", "4:24", "did you mean 'group_size'?"),
        (
            HEAD + "weights:\n  scheme: int4\n  solver: {kind: rtn, serach: full}\n",
            "5:23",
            "did you mean 'search'?",
        ),
        (
            SMALL + "evaluate: {gates: [{metrik: kl, max_increase: 1, metric: kl}]}\n",
            "4:21",
            "did you mean 'metric'?",
        ),
        (SMALL + "evaluate: {tasks: [{name: a, limits: 1}]}\n", "4:30", "did you mean 'limit'?"),
        # missing and wrong values
        (HEAD, "1:1", "key 'weights' is missing"),
        ("schema_version: 1\nmodel: {}\nweights: {scheme: int4}\n", "2:1", "key 'model.source' is missing"),
        (SMALL.replace("1", "2"), "1:17", "schema_version: must be 1, not 2"),
        (SMALL + "seed: yes\n", "4:7", "seed: must be a whole number, not 'yes'"),
        (SMALL + "seed: true\n", "4:7", "seed: must be a number, not true"),
        (SMALL + "seed: -1\n", "4:7", "seed: must be greater than or equal to 0"),
        (SMALL + "name: 12\n", "4:7", "name: must be text, not 12 -> put it in quotes"),
        (SMALL + "name: a/b\n", "4:7", "name: must be up to 100 letters"),
        (SMALL + "export: 3\n", "4:9", "export: must be a map of keys, not 3"),
        (HEAD + "weights: {scheme: nvpf4}\n", "3:19", "did you mean 'nvfp4'?"),
        (HEAD + "weights: {scheme: int4, solver: rnt}\n", "3:33", "did you mean 'rtn'?"),
        (HEAD + "weights: {scheme: {group_size: 64}}\n", "3:11", "needs the key 'kind'"),
        (
            HEAD + "weights: {scheme: {kind: int4, group_size: 7}}\n",
            "3:44",
            "weights.scheme.group_size: must be",
        ),
        (HEAD + "weights: {scheme: int4, ignore: lm_head}\n", "3:33", "weights.ignore: must be a list"),
        (
            HEAD + "weights:\n  scheme: int4\n  ignore:\n  - a\n  - re:(\n",
            "7:5",
            "invalid regular expression",
        ),
        (HEAD + "weights: {scheme: int4, ignore: ['re:(a+)+']}\n", "3:34", "exponential time"),
        (
            HEAD + "weights: {scheme: int4, rules: [{match: [], scheme: copy}]}\n",
            "3:34",
            "match: must not be empty",
        ),
        (
            HEAD + "weights: {scheme: int4, rules: [{match: a, scheme: copy, solver: rtn}]}\n",
            "3:66",
            "no effect",
        ),
        (HEAD + "weights: {scheme: copy}\n", "3:19", "unknown scheme 'copy'"),
        (SMALL.replace("source: some/model", "source: a, sha256: " + "0" * 64), "2:28", "single .gguf file"),
        (
            HEAD.replace("m.gguf", "m.gguf, sha256: abc") + "weights: {scheme: int4}\n",
            "2:33",
            "must be 64 hexadecimal digits",
        ),
        (SMALL + "evaluate: true\n", "4:11", "must be a map of keys, not true"),
        (SMALL + "evaluate: {tasks: [piqa, {name: piqa}]}\n", "4:26", "task 'piqa' is listed twice"),
        (
            SMALL + "evaluate: {gates: [{metric: task:x, max_increase: 1}]}\n",
            "4:29",
            "no task 'x' in evaluate.tasks",
        ),
        (
            SMALL + "evaluate: {gates: [{metric: ppl, max_increase: 1}]}\n",
            "4:29",
            "known: perplexity, kl, task, task:NAME, needle",
        ),
        (SMALL + "evaluate: {gates: [{metric: kl, max_increase: 3%}]}\n", "4:47", "kl is absolute"),
        (SMALL + "evaluate: {gates: [{metric: kl}]}\n", "4:20", "a gate needs a bound"),
        (
            SMALL + "evaluate: {gates: [{metric: kl, max_increase: 1, min_recovery: 0.5}]}\n",
            "4:64",
            "has one bound",
        ),
        (SMALL + "evaluate: {gates: [{metric: kl, min_recovery: 99%}]}\n", "4:47", "kl has no recovery"),
        (
            SMALL + "evaluate: {gates: [{metric: acceptance, max_increase: 1}]}\n",
            "4:55",
            "itself a share",
        ),
        (
            SMALL + "evaluate: {gates: [{metric: perplexity, max_increase: 1, uncertain: fail}]}\n",
            "4:69",
            "without confidence nothing is uncertain",
        ),
        (
            SMALL + "evaluate: {gates: [{metric: perplexity, max_increase: 1, confidence: 95}]}\n",
            "4:70",
            "less than or equal to 0.999",
        ),
        (
            SMALL + "evaluate: {gates: [{metric: task, max_increase: 1, confidence: 0.99999999999999999}]}\n",
            "4:64",
            "less than or equal to 0.999",
        ),
        (
            "model: {source: x}\n"
            "weights: {scheme: auto, budget: {bytes: 1GB}, candidates: [{kind: int4, grup_size: 32}]}\n",
            "2:73",
            "did you mean 'group_size'",
        ),
        (
            SMALL + "evaluate: {gates: [{metric: task, max_increase: 1}]}\n",
            "4:29",
            "no task in evaluate.tasks",
        ),
        (SMALL + "evaluate: {gates: [{metric: needle, max_increase: 1}]}\n", "4:29", "hides nothing"),
        (SMALL + "evaluate: {seeds: [1, 1]}\n", "4:12", "a seed is listed twice"),
        (SMALL + "evaluate: {seeds: []}\n", "4:12", "must not be empty"),
        (SMALL + "evaluate: {gates: [{metric: kl, max_increase: .nan}]}\n", "4:47", "finite number"),
        (
            SMALL + "evaluate: {gates: [{metric: perplexity, max_increase: 3 percent}]}\n",
            "4:55",
            "percentage such as",
        ),
        (SMALL + "export: {max_shard_bytes: 2TB}\n", "4:27", "'2TB' is no size"),
        (SMALL + "export: {max_shard_bytes: 0}\n", "4:27", "must be greater than or equal to 1"),
        # environment and secrets
        (SMALL + "name: ${NO_SUCH_VARIABLE}\n", "4:7", "NO_SUCH_VARIABLE is not set"),
        (SMALL + "name: ${oh no}\n", "4:7", "malformed variable"),
        (SMALL.replace("source: some/model", "source: a, hf_token: x"), "2:20", "looks like a secret"),
        (SMALL + "unknown: {deep: [{api_key: x}]}\n", "4:19", "looks like a secret"),
        # extends
        (SMALL + "extends: [3]\n", "4:1", "`extends` is a recipe file or a list of them"),
        (SMALL + "extends: a.json\n", "4:10", "names a .yaml file"),
        (SMALL + "extends: [none.yaml]\n", "4:11", "no such recipe: none.yaml"),
        (SMALL + f"extends: {'a' * 300}.yaml\n", "4:10", "no such recipe"),
        (SMALL + "extends: r.yaml\n", "4:10", "goes in a circle: r.yaml -> r.yaml"),
        (SMALL + "+extends: [a.yaml]\n", "4:1", "'extends' is never inherited"),
        (SMALL + "+seed: 1\n", "4:1", "'+seed' needs a list to append"),
        (HEAD + "weights: {scheme: int4, ignore: [], +ignore: []}\n", "3:37", "cannot stand together"),
    ],
)
def test_place_and_message(faults: Faults, text: str, where: str, message: str) -> None:
    """The first fault lies at exactly this place and says this."""
    place, found = faults(text)[0]
    assert message in found
    assert place == f"r.yaml:{where}"


@pytest.mark.parametrize("path", RESERVED)
@pytest.mark.parametrize("value", ["null", "{}", "{bits: 8}", "auto"])
def test_sections_without_a_stage_are_refused(faults: Faults, path: tuple[str, ...], value: str) -> None:
    """Reserved keys are refused in any form, at their place, with the version."""
    if len(path) == 1:
        text, where = f"{SMALL}{path[0]}: {value}\n", "r.yaml:4:1"
    else:
        text, where = SMALL.replace("{source", f"{{{path[1]}: {value}, source"), "r.yaml:2:9"
    ((place, found),) = faults(text)
    assert place == where
    assert f"{path[-1]}' is not available in this version (0." in found


def test_all_faults_at_once(faults: Faults) -> None:
    """Faults of the text, the overrides and the values are reported together, each once."""
    text = f"""\
{HEAD}publish: {{}}
seed: ${{NO_SUCH_VARIABLE}}
weights:
  scheme: int5
  scheme: int4
  rules: [{{match: a, shceme: copy}}]
export: {{max_shard_bytes: x}}
"""
    found = faults(text, ["weights.scheme.x=1", "nmae=x"])
    assert sorted(where for where, _ in found) == [
        "--set nmae=x",
        "--set weights.scheme.x=1",
        "r.yaml:3:1",
        "r.yaml:4:7",
        "r.yaml:6:11",
        "r.yaml:7:3",
        "r.yaml:8:11",
        "r.yaml:8:22",
        "r.yaml:9:27",
    ]


def test_the_message_lists_every_fault(write: Write) -> None:
    """The error's own text has one line for each fault, up to a bound."""
    path = write(SMALL + "".join(f"zz{index}: 1\n" for index in range(MAX_SHOWN + 7)))
    with pytest.raises(RecipeFaults) as caught:
        load_recipe(str(path))
    assert len(caught.value.faults) == MAX_SHOWN + 7
    assert str(caught.value).count("unknown key") == MAX_SHOWN
    assert str(caught.value).endswith("... and 7 more faults")


def test_a_fault_of_a_parent_names_the_parent(faults: Faults, write: Write) -> None:
    """A value is blamed on the file in which it was written."""
    write("weights: {scheme: int5}\nseed: -1\n", "base/b.yaml")
    found = faults("schema_version: 1\nextends: base/b.yaml\nmodel: {source: 3}\nseed: 2\n")
    assert sorted(where for where, _ in found) == ["base/b.yaml:1:19", "r.yaml:3:17"]


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    """No file, a folder, text that is not UTF-8, a file too large: each says so and where."""
    write(SMALL, "folder/r.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# a\nname: caf\xe9\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * 1_000_001)
    for path, message in [
        ("none.yaml", "no such recipe: none.yaml"),
        ("recipes/smollm2-nvfp5.yaml", "did you mean 'recipes/smollm2-nvfp4.yaml'?"),
        ("a" * 5000, "no such recipe"),
        ("~no_such_user_here/r.yaml", "no such recipe"),
        ("a\0b", "no such recipe"),
        ("folder", "folder: is not a file"),
        ("latin.yaml", "latin.yaml:2: the file is not UTF-8"),
        ("large.yaml", "large.yaml: a recipe has at most 1000000 bytes"),
    ]:
        with pytest.raises(RecipeFaults) as caught:
            load_recipe(path)
        assert message in str(caught.value)
