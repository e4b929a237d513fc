"""The model card and its figure, from records alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from markdown import markdown

from adapters.assembly import draft_of_bundle
from adapters.bundle import load_bundle
from adapters.card import card_text
from adapters.conformance import read_conformance
from adapters.evaluate import collate_task
from adapters.figure import draw_records, scored_split
from adapters.layout import Reference, TaskRecord, task_files, verify_bundle

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def draft(bundle_dir):
    return draft_of_bundle(bundle_dir)


def card_of(draft, **changes) -> tuple[dict, str]:
    """Front matter and text of the card of a changed draft."""
    changed = replace(draft, **changes)
    sizes = {name: len(content) for name, content in draft.files.items()}
    text = card_text(changed.card, changed.records, base=changed.base, encoder=changed.encoder, sizes=sizes)
    return yaml.safe_load(text.split("---\n")[1]), text


def test_front_matter_is_what_the_hub_indexes(draft):
    front, _ = card_of(draft)
    assert front["license"] == "other"
    assert front["license_name"] == "see-licences-below"
    assert front["library_name"] == "kymo"
    assert front["datasets"] == ["coded", "staged"]
    assert {"eeg", "ecg", "peft", "sleep_staging", "rhythm"} <= set(front["tags"])
    assert "base_model" not in front
    result = front["model-index"][0]["results"][0]
    assert result["dataset"]["split"] == "test"
    kappa = draft.records["sleep_staging"].scores["test"]["metrics"]["kappa"]["value"]
    assert {"type": "kappa", "value": round(kappa, 4), "name": "Cohen's kappa"} in result["metrics"]


def test_a_base_on_the_hub_is_named_as_such(draft):
    reference = Reference(repo_id="lab/sleep", revision="1" * 40)
    front, text = card_of(draft, base=draft.base.model_copy(update={"reference": reference}))
    assert (front["base_model"], front["base_model_relation"]) == ("lab/sleep", "adapter")
    assert f"`lab/sleep@{'1' * 40}:encoder.safetensors`, fetched by its commit" in text


def test_text_states_purpose_needs_scores_limits_and_origin(draft):
    _, text = card_of(draft)
    record = draft.records["sleep_staging"]
    entry = record.scores["test"]["metrics"]["kappa"]
    assert "Not for clinical use" in text
    assert "kymo predict OWNER/NAME@VERSION FILE.edf --task sleep_staging" in text
    assert "W, N1, N2, N3, R" in text
    assert "| eeg | 1 | 24 Hz | 0 to 12 Hz at 32 Hz |" in text
    assert (
        f"| Cohen's kappa | {entry['value']:.3f} | {entry['interval'][0]:.3f} to {entry['interval'][1]:.3f} |" in text
    )
    assert record.data["splits"]["test"]["digest"][:16] in text
    assert "from so few it is too narrow" in text
    assert "train: 80 windows (0.18 h), 4 subjects (staged 4)" in text
    assert "| base | sleep" in text
    assert "| corpus | staged | CC0-1.0 |" in text
    assert "| pretraining corpus | staged | CC0-1.0 |" in text
    assert "no legal advice" in text


def test_persons_that_pretraining_saw_are_counted_or_called_unknown(draft):
    """The card of a bundle tells no persons, that of the run did: two of the staged test and val persons."""
    record = draft.records["sleep_staging"]
    assert record.data["pretrain_seen"]["test"]["subjects_seen"] == 1
    assert record.data["pretrain_seen"]["val"]["subjects_seen"] == 1
    assert draft.records["rhythm"].data["pretrain_seen"]["test"]["subjects_seen"] == 0
    _, text = card_of(draft)
    assert "val and test, persons that pretraining saw: 1 of the 2 tested persons were in pretraining" in text


def test_what_the_maker_says_stands_in_the_card(draft):
    card = draft.card.model_copy(
        update={"title": "Night owls", "licence": "CC-BY-4.0", "authors": ["A. Berger"], "citation": "Berger 1929"}
    )
    front, text = card_of(draft, card=card)
    assert front["license"] == "cc-by-4.0"
    assert "license_name" not in front
    assert "# Night owls" in text
    assert "## Citation" in text
    assert "* Berger 1929" in text
    assert "A. Berger" in text
    assert "grants nothing by itself" not in text


def test_a_task_without_scores_has_a_card_and_a_figure(draft):
    bare = {name: record.model_copy(update={"scores": {}}) for name, record in draft.records.items()}
    front, text = card_of(draft, records=bare)
    assert "model-index" not in front
    assert "not scored" in text
    assert scored_split(bare["rhythm"]) is None
    assert draw_records(bare).startswith(PNG)


def test_yes_or_no_labels_are_drawn_by_their_auroc(draft):
    record: TaskRecord = draft.records["rhythm"]
    labels = {label: {"auroc": {"value": 0.8, "interval": [0.6, 0.9], "chance": 0.5}} for label in record.task.labels}
    labels["af"] = {}
    scores = {**record.scores["test"], "per_label": labels}
    changed = record.model_copy(
        update={"task": record.task.model_copy(update={"loss": "bce"}), "scores": {"test": scores}}
    )
    drawn = draw_records({"rhythm": changed})
    assert drawn.startswith(PNG)
    assert drawn != draw_records({"rhythm": record})


def test_the_figure_is_a_function_of_the_scores(draft, bundle_dir):
    drawn = draw_records(draft.records)
    assert drawn == draw_records(load_bundle(bundle_dir).records)
    assert drawn == (bundle_dir / "scores.png").read_bytes()
    assert b"Software" not in drawn
    record = draft.records["rhythm"]
    scores = record.scores["test"]
    worse = {**scores["metrics"], "kappa": {"value": 0.1, "interval": [-0.2, 0.3], "chance": 0.0}}
    other = record.model_copy(update={"scores": {"test": {**scores, "metrics": worse}}})
    assert draw_records({**draft.records, "rhythm": other}) != drawn


def test_every_table_is_a_table_when_rendered(bundle_dir: Path):
    """A table that lacks a blank line before it would come out as a paragraph of bars."""
    verify_bundle(bundle_dir)
    body = (bundle_dir / "README.md").read_text().split("---\n", 2)[2]
    page = markdown(body, extensions=["tables", "fenced_code"])
    assert page.count("<table>") == body.count("\n|---")
    assert "<p>|" not in page
    assert '<img alt="Metrics of each task with their intervals" src="scores.png"' in page
    assert page.count("<pre>") == 2


def test_a_base_is_described_with_what_it_was_pretrained_on(draft):
    _, text = card_of(draft)
    assert "| Tiny staged | 96 | 0.2 | 4 | CC0-1.0 |" in text
    _, silent = card_of(draft, encoder=draft.encoder.model_copy(update={"pretrained_on": None}))
    assert "What it was pretrained on is not recorded." in silent


def test_the_code_in_the_card_runs_as_it_stands(bundle_dir: Path) -> None:
    text = (bundle_dir / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("BUNDLE", str(bundle_dir))
    bundle = load_bundle(bundle_dir)
    windows, expected = read_conformance(bundle_dir / task_files("sleep_staging")["conformance"])
    names = {"batch": collate_task(bundle.records["sleep_staging"].task, windows)}
    with torch.no_grad():
        exec(code, names)
        logits = bundle.model.heads["sleep_staging"](names["features_BD"])
    torch.testing.assert_close(logits, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_the_code_of_a_fused_adapter_and_of_a_base_on_the_hub_says_so(draft):
    record = draft.records["rhythm"]
    fused = record.model_copy(update={"lora": record.lora.model_copy(update={"attn": "fused"})})
    reference = Reference(repo_id="lab/sleep", revision="1" * 40, filename="sleep.safetensors")
    base = draft.base.model_copy(update={"reference": reference})
    _, text = card_of(draft, records={"rhythm": fused}, base=base)
    assert "fuse_attention(encoder.blocks)" in text
    assert f'weights_file=fetch_file("lab/sleep", "{"1" * 40}", "sleep.safetensors")' in text
