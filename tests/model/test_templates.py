"""Templates of prompts: defaults, what is refused, older runs, and tokens of tokenizers that write a blank before a text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from dti_model.cli import main
from dti_model.config import GLUED, ModelConfig, TrainConfig
from dti_model.config.older import as_it_began
from dti_model.model.fingerprints import settings_fingerprint
from dti_model.prompts import PromptFormat
from dti_model.training.start import with_template_of_run
from tests.model.pretrained_files import small_tokenizer


def test_pretrained_models_have_a_template_by_default() -> None:
    """Labels were glued to the next title, and an instruction to the first one."""
    assert ModelConfig().prompt_template == GLUED == "{item}{label}"
    template = ModelConfig(pretrained="x").prompt_template
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["[SUM]"], special_tokens=True)
    found = PromptFormat.of(tokenizer, 3, instruction="Does the user like it?", template=template)
    assert tokenizer.decode(found.prefix) == "<s>Does the user like it?\n"
    assert (tokenizer.decode(found.cue), tokenizer.decode(found.separator)) == (" ->", "\n")
    glued = PromptFormat.of(tokenizer, 3, instruction="Does the user like it?")
    assert tokenizer.decode(glued.prefix) == "<s>Does the user like it?"
    assert glued.before == glued.cue == glued.separator == ()


def test_the_blank_before_a_label_is_the_labels_own() -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["[SUM]"], special_tokens=True)
    one, other = (
        PromptFormat.of(tokenizer, 3, template=f"{{item}}? {blank}{{label}}.") for blank in ("", " ")
    )
    assert tokenizer.decode(one.cue) == "?"
    assert tokenizer.decode(other.cue) == "? "
    assert tokenizer.decode([*one.cue, one.labels[1], *one.separator]) == "? yes."


def test_pieces_of_sentencepiece_have_no_blank_before_them() -> None:
    """Encoded alone, the text ")" began with a blank, which running text has none of."""
    words = [
        ("<unk>", 0.0),
        ("▁", -3.0),
        (":", -2.0),
        (")", -2.0),
        ("▁no", -1.0),
        ("▁yes", -1.0),
        ("▁:", -1.5),
    ]
    backend = Tokenizer(Unigram(words, unk_id=0))
    backend.pre_tokenizer = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(["[SUM]"], special_tokens=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(")")) == ["▁", ")"]
    found = PromptFormat.of(tokenizer, 3, template="{item}){label}:")
    assert tokenizer.convert_ids_to_tokens([*found.cue, *found.separator]) == [")", ":"]


@pytest.mark.parametrize(
    "template", ["{item}", "{label}{item}", "{item}{item}{label}", "{item} {x} {label}", "{item}{label}{", ""]
)
def test_a_template_without_its_fields_is_refused(template: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match=r"model.template must be text that holds \{item\} and then \{label\}"
    ):
        ModelConfig(pretrained="x", template=template)
    words = ["--data", "d", "--out", "o", "--model.pretrained", "x", f"--model.template={template}"]
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--model.template must be text that holds {item} and then {label}, once each" in line


def test_runs_from_before_there_was_a_choice_keep_their_prompts() -> None:
    """Their config.yaml names no template, and their fingerprints hold."""
    began = as_it_began({"model": {"pretrained": "/x", "instruction": "Hi"}})
    assert began["model"]["template"] == GLUED
    assert "template" not in as_it_began({"model": {"pretrained": None}})["model"]
    older = TrainConfig(Path("d"), Path("o"), model=ModelConfig(**began["model"]))
    assert settings_fingerprint(older) == "46f4c1d87a6949dc22d219c59eac61f46ba54987c95f79919650488239895ba7"
    newer = TrainConfig(Path("d"), Path("o"), model=ModelConfig(pretrained="/x", instruction="Hi"))
    assert settings_fingerprint(newer) != settings_fingerprint(older)


def test_an_interrupted_run_goes_on_with_its_template(tmp_path: Path) -> None:
    """Of a version without templates, and with the same command, which names none."""
    older = TrainConfig(tmp_path, tmp_path / "run", model=ModelConfig(pretrained="/x", template=GLUED))
    older.save(older.out)
    same = replace(older, model=ModelConfig(pretrained="/x"))
    assert with_template_of_run(same).model.template == GLUED
    fresh = replace(same, out=tmp_path / "other")
    assert with_template_of_run(fresh) == fresh
