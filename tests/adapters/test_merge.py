import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from adapters.assembly import draft_of_bundle, record_bytes
from adapters.bundle import Bundle, load_bundle, save_draft, write_bundle
from adapters.config import AdaptConfig
from adapters.conformance import read_conformance
from adapters.evaluate import collate_task
from adapters.fused import fuse_attention
from adapters.layout import read_manifest
from adapters.layout import task_files as files_of
from adapters.merge import add_bundle, add_run, load_merged, merge_task, plan_addition
from adapters.train import adapt
from manifests.config import dump_yaml
from manifests.errors import ConfigError, ContractError
from manifests.tasks import load_task
from trainer.export import load_encoder, read_card, save_encoder


@pytest.fixture
def one_task(make_config, task_files, snapshots, tmp_path):
    """Configuration of a short run on the rhythm task under another id."""

    def make(task_id: str = "second", **changes: Any) -> AdaptConfig:
        path = tmp_path / f"{task_id}.yaml"
        task = load_task(task_files["rhythm"]).model_copy(update={"id": task_id})
        path.write_text(dump_yaml(task.model_dump(mode="json")))
        tasks = [{"task": str(path), "snapshots": [str(snapshots["coded"])], "batch": 8}]
        short = {"steps": 2, "keep": "last", "run_dir": str(tmp_path / f"run-{task_id}")}
        return make_config(**{"tasks": tasks, **short, **changes})

    return make


@pytest.fixture
def grown(bundle_dir, one_task, tmp_path) -> Bundle:
    return add_run(bundle_dir, adapt(plan_addition(bundle_dir, one_task())), tmp_path / "grown")


def logits_of(bundle: Bundle, task: str) -> torch.Tensor:
    windows, _ = read_conformance(bundle.path / files_of(task)["conformance"])
    with torch.no_grad():
        return bundle.model(task, collate_task(bundle.records[task].task, windows))


def test_a_new_task_leaves_those_of_the_bundle_as_they_are(bundle_dir, grown):
    before, after = read_manifest(bundle_dir), read_manifest(grown.path)
    assert after.tasks == [*before.tasks, "second"]
    kept = [name for name in before.files if name not in ("README.md", "scores.png")]
    assert {name: after.files[name] for name in kept} == {name: before.files[name] for name in kept}
    assert after.base == before.base
    old = load_bundle(bundle_dir)
    for task in before.tasks:
        assert torch.equal(logits_of(grown, task), logits_of(old, task))
    record = grown.records["second"]
    assert record.base_sha256 == before.base.sha256
    assert record.provenance["settings"]["temporal"] == "frozen"
    assert load_file(grown.path / files_of("second")["adapter"])
    assert "`second`" in (grown.path / "README.md").read_text()


def seen_in_test(bundle: Bundle) -> dict[str, int | None]:
    """Added task to the tested persons that pretraining saw."""
    names = bundle.records.keys() & {"second", "nights"}
    return {name: bundle.records[name].data["pretrain_seen"]["test"]["subjects_seen"] for name in names}


def test_whom_pretraining_saw_of_an_added_task_is_told_where_it_can_be(
    bundle_dir, one_task, encoder_dir, snapshots, tmp_path
):
    """The base was pretrained on `staged`; `second` is of another corpus, `nights` of that one."""
    task = load_bundle(bundle_dir).records["sleep_staging"].task.model_copy(update={"id": "nights"})
    (tmp_path / "nights.yaml").write_text(dump_yaml(task.model_dump(mode="json")))
    nights = {"task": str(tmp_path / "nights.yaml"), "snapshots": [str(snapshots["staged"])], "batch": 8}
    tasks = [*one_task().model_dump()["tasks"], nights]

    def grow(bundle: Path, name: str, encoder: str) -> Bundle:
        config = one_task(tasks=tasks, encoder=encoder, run_dir=str(tmp_path / f"run-{name}"), eval_windows=16)
        return add_run(bundle, adapt(plan_addition(bundle, config)), tmp_path / name)

    at_home = grow(bundle_dir, "home", str(encoder_dir))
    assert seen_in_test(at_home) == {"second": 0, "nights": 1}
    facts = read_card(encoder_dir).pretrained_on
    assert facts is not None
    assert facts.subjects is not None
    texts = [path.read_text() for path in (*at_home.path.rglob("*.json"), at_home.path / "README.md")]
    assert not [name for name in facts.subjects["staged"] for text in texts if name in text], "a person is named"
    # A stranger has the bundle alone, whose card names corpora.
    abroad = grow(bundle_dir, "abroad", "absent")
    assert seen_in_test(abroad) == {"second": 0, "nights": None}
    reason = "Not known: the encoder's card tells how many persons of staged were in pretraining, not who."
    assert f"test, persons that pretraining saw: {reason}" in (abroad.path / "README.md").read_text()
    # A bundle on the same base whose card tells nothing, joined with one whose card names corpora.
    draft = draft_of_bundle(abroad.path)
    records, files = dict(draft.records), dict(draft.files)
    for name in ("second", "nights"):
        seen = records[name].data["pretrain_seen"]
        mute = {split: {**found, "subjects_seen": None, "sentence": "Not known."} for split, found in seen.items()}
        records[name] = records[name].model_copy(update={"data": {**records[name].data, "pretrain_seen": mute}})
        files[files_of(name)["record"]] = record_bytes(records[name])
    encoder = draft.encoder.model_copy(update={"pretrained_on": None})
    save_draft(replace(draft, records=records, files=files, encoder=encoder), tmp_path / "mute")
    joined = add_bundle(bundle_dir, tmp_path / "mute", tmp_path / "joined")
    assert seen_in_test(joined) == {"second": 0, "nights": None}
    assert torch.equal(logits_of(joined, "second"), logits_of(abroad, "second"))


def test_a_plan_is_the_same_every_time_and_refuses_what_does_not_fit(bundle_dir, one_task):
    config = one_task()
    first = read_card(plan_addition(bundle_dir, config).encoder)
    assert read_card(plan_addition(bundle_dir, config).encoder) == first
    shared = load_file(bundle_dir / "shared/temporal_encoder.safetensors")
    encoder = load_encoder(f"{config.run_dir}/encoder")
    for name, tensor in encoder.get_submodule("temporal_encoder").state_dict().items():
        assert torch.equal(tensor, shared[name])
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["encoder"]
    edited = json.loads((Path(config.run_dir) / "encoder" / "encoder.json").read_text()) | {"step": 8}
    (Path(config.run_dir) / "encoder" / "encoder.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match="of another bundle; choose another run_dir"):
        plan_addition(bundle_dir, config)
    with pytest.raises(ConfigError, match="has a task rhythm already"):
        plan_addition(bundle_dir, one_task("rhythm"))
    with pytest.raises(ConfigError, match=r"kind lora, attn fused; the tasks of .* have lora, split"):
        plan_addition(bundle_dir, one_task(lora={"attn": "fused"}))


def test_a_run_with_another_temporal_encoder_is_not_added(bundle_dir, one_task, tmp_path):
    with pytest.raises(ContractError, match="its temporal encoder is not that of"):
        add_run(bundle_dir, adapt(one_task()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_may_grow_in_its_place_and_from_another_bundle(bundle_dir, grown, one_task, tmp_path):
    other = save_draft(draft_of_bundle(bundle_dir), tmp_path / "other")
    assert (other.path / "bundle.json").read_bytes() == (bundle_dir / "bundle.json").read_bytes()
    add_run(other.path, adapt(plan_addition(other.path, one_task("third"))), other.path)
    both = add_bundle(grown.path, other.path, tmp_path / "both")
    assert list(both.records) == ["sleep_staging", "rhythm", "second", "third"]
    for name in ("second", "third"):
        source = grown if name == "second" else load_bundle(other.path)
        assert torch.equal(logits_of(both, name), logits_of(source, name))


def test_bundles_that_do_not_belong_together_are_not_joined(bundle_dir, one_task, make_encoder, tmp_path):
    result = adapt(one_task())
    write_bundle(result, tmp_path / "shared")
    with pytest.raises(ConfigError, match="trained with another temporal encoder"):
        add_bundle(bundle_dir, tmp_path / "shared", tmp_path / "out")
    save_encoder(tmp_path / "encoder", make_encoder(seed=1), recipes={}, step=7)
    write_bundle(adapt(one_task("third", encoder=str(tmp_path / "encoder"))), tmp_path / "base")
    with pytest.raises(ConfigError, match="stands on another base"):
        add_bundle(bundle_dir, tmp_path / "base", tmp_path / "out")


def test_tasks_of_one_name_and_other_content_are_not_joined(bundle_dir, one_task, grown, tmp_path):
    config = one_task(seed=5, run_dir=str(tmp_path / "again"))
    again = add_run(bundle_dir, adapt(plan_addition(bundle_dir, config)), tmp_path / "again-bundle")
    with pytest.raises(ConfigError, match="task second is in the bundle already, with other content"):
        add_bundle(grown.path, again.path, tmp_path / "out")
    assert add_bundle(grown.path, grown.path, tmp_path / "same").records == grown.records


def test_a_corpus_that_the_bundles_licence_exceeds_is_not_added(bundle_dir, one_task, tmp_path):
    draft = draft_of_bundle(bundle_dir)
    card = draft.card.model_copy(update={"licence": "cc-by-4.0"})
    open_bundle = save_draft(replace(draft, card=card), tmp_path / "open").path
    result = adapt(plan_addition(open_bundle, one_task()))
    data = result.data["second"]
    data["corpora"]["coded"]["licence"] = "CC-BY-NC-4.0"
    with pytest.raises(ConfigError, match=r"grants more .* corpus coded \(CC-BY-NC-4\.0\)"):
        add_run(open_bundle, replace(result, data={"second": data}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def fused_dir(snapshots, encoder_dir, task_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one task whose adapter has q, k and v as one layer."""
    root = tmp_path_factory.mktemp("fused")
    config = AdaptConfig.model_validate(
        {
            "run_dir": str(root / "run"),
            "encoder": str(encoder_dir),
            "tasks": [{"task": str(task_files["rhythm"]), "snapshots": [str(snapshots["coded"])], "batch": 8}],
            "lora": {"r": 4, "attn": "fused"},
            "optimizer": {"lr_lora": 0.05},
            "steps": 4,
        }
    )
    return write_bundle(adapt(config), root / "bundle").path


@pytest.mark.parametrize("which", ["bundle_dir", "fused_dir"])
def test_a_merged_task_gives_the_logits_of_its_adapter_without_peft(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    merged = merge_task(folder, "rhythm", tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
        "head.safetensors",
        "task.json",
    ]
    assert merged.encoder.state_dict().keys() == load_encoder(folder / "base").state_dict().keys()
    bundle = load_bundle(folder)
    windows, _ = read_conformance(folder / files_of("rhythm")["conformance"])
    batch = collate_task(merged.record.task, windows)
    again = load_merged(tmp_path / "merged")
    with torch.no_grad():
        logits = again.head(again.encoder(batch).pooled_BD)
        base = load_encoder(folder / "base")
        base.get_submodule("temporal_encoder").load_state_dict(bundle.model.shared.state_dict())
        plain = again.head(base(batch).pooled_BD)
    torch.testing.assert_close(logits, logits_of(bundle, "rhythm"), rtol=0, atol=1e-5)
    assert (logits - plain).abs().max() > 1e-3
    merge_task(folder, "rhythm", tmp_path / "merged")  # once more, over the first


def test_a_merged_model_is_not_written_over_other_things(bundle_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds no merged model"):
        merge_task(bundle_dir, "rhythm", tmp_path)


def test_nothing_is_merged_into_a_base_without_derivatives(bundle_dir, tmp_path):
    draft = draft_of_bundle(bundle_dir)
    encoder = draft.encoder.model_copy(update={"licence": "CC-BY-NC-ND-4.0"})
    folder = save_draft(replace(draft, encoder=encoder), tmp_path / "closed").path
    with pytest.raises(ConfigError, match="permits no derivatives, and merged weights are one"):
        merge_task(folder, "rhythm", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_stock_peft_reads_a_fused_adapter_on_a_fused_encoder(fused_dir):
    bundle = load_bundle(fused_dir)
    windows, _ = read_conformance(fused_dir / files_of("rhythm")["conformance"])
    batch = collate_task(bundle.records["rhythm"].task, windows)
    encoder = load_encoder(fused_dir / "base")
    encoder.get_submodule("temporal_encoder").load_state_dict(
        load_file(fused_dir / "shared/temporal_encoder.safetensors")
    )
    fuse_attention(encoder.blocks)
    stock = peft.PeftModel.from_pretrained(encoder, str(fused_dir / "adapters" / "rhythm")).eval()
    with torch.no_grad():
        features = stock(batch).pooled_BD
        logits = bundle.model.heads["rhythm"](features)
    np.testing.assert_array_equal(logits, logits_of(bundle, "rhythm"))
