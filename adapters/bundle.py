"""Bundles: written from a finished run, read back with every check, ready to predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.assembly import Draft, check_place, draft_of_run, write_draft
from adapters.conformance import check_conformance
from adapters.hub import ANYBODY, Access, fetch_file
from adapters.layout import (
    BASE_CARD,
    MANIFEST_FILE,
    SHARED_FILE,
    Manifest,
    Reference,
    TaskRecord,
    chosen_tasks,
    read_record,
    read_tensors,
    task_files,
    verify_bundle,
)
from adapters.model import MultiTaskModel, load_strict
from adapters.source import bundle_folder
from adapters.train import AdaptResult
from manifests.errors import ContractError
from manifests.files import replaced_folder
from manifests.recipes import Recipe
from trainer.export import load_encoder, read_card
from trainer.models.build import Encoder


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Bundle:
    """A bundle ready to predict, its model in evaluation mode."""

    path: Path
    manifest: Manifest
    model: MultiTaskModel
    records: dict[str, TaskRecord]

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, tasks={list(self.records)})"

    def by_recipe(self) -> list[tuple[Recipe, list[str]]]:
        """Recipes of the bundle, each with the tasks that read its windows; every window is kept."""
        groups: list[tuple[Recipe, list[str]]] = []
        for name, record in self.records.items():
            recipe = record.recipe.model_copy(update={"keep": "all"})
            same = next((tasks for known, tasks in groups if known == recipe), None)
            if same is None:
                groups.append((recipe, [name]))
            else:
                same.append(name)
        return groups


def load_bundle(source: Path | str, tasks: Sequence[str] | None = None, *, access: Access = ANYBODY) -> Bundle:
    """Bundle ready to predict, its logits on the conformance input checked.

    Args:
        source: Folder of the bundle, `OWNER/NAME@VERSION` on the hub, or `URL@VERSION`; files of other tasks than those
            asked for may be absent.
        tasks: Tasks to load; None = all.
        access: The hub and the cache.

    Raises:
        ContractError: Anything that is not as `bundle.json` says, or logits that differ by more than 1e-4.
        ConfigError: There is no such bundle, or the hub does not give it or its base.
    """
    path = bundle_folder(source, tasks, access=access)
    manifest = verify_bundle(path, tasks)
    chosen = chosen_tasks(manifest, tasks)
    records = {name: read_record(path, name, manifest) for name in chosen}
    model = MultiTaskModel(
        load_base(path, manifest, access=access),
        {name: len(record.task.labels) for name, record in records.items()},
        lora={name: record.lora for name, record in records.items()},
    ).eval()
    load_strict(SHARED_FILE, model.shared, read_tensors(path, SHARED_FILE, manifest))
    for name in chosen:
        files = task_files(name)
        model.load_adapter(name, read_tensors(path, files["adapter"], manifest))
        load_strict(files["head"], model.heads[name], read_tensors(path, files["head"], manifest))
        check_conformance(model, records[name], path / files["conformance"])
    return Bundle(path=path, manifest=manifest, model=model, records=records)


def load_base(path: Path, manifest: Manifest, *, access: Access = ANYBODY) -> Encoder:
    """Base encoder of a verified bundle, from the folder or fetched by its commit.

    Raises:
        ContractError: It is another encoder than `bundle.json` names, or of another channel table.
        ConfigError: The hub does not give it.
    """
    card = read_card(path / Path(BASE_CARD).parent)
    for name, found, listed in (
        ("sha256", card.sha256, manifest.base.sha256),
        ("ucs_version", card.ucs_version, manifest.ucs_version),
        ("ucs_digest", card.ucs_digest, manifest.ucs_digest),
    ):
        if found != listed:
            raise ContractError(
                f"{path / BASE_CARD}: {name} is {found}, bundle.json names {listed}; the base was exchanged, fetch the "
                "bundle again"
            )
    weights = None
    if (reference := manifest.base.reference) is not None:
        weights = fetch_file(reference.repo_id, reference.revision, reference.filename, access=access)
    return load_encoder(path / Path(BASE_CARD).parent, weights_file=weights)


def write_bundle(
    result: AdaptResult, directory: Path | str, *, base: Reference | None = None, access: Access = ANYBODY
) -> Bundle:
    """Bundle of a finished run, written to `directory` and read back; the same run gives the same bytes.

    It is written beside and renamed. An earlier bundle in its place is replaced.

    Args:
        result: The run.
        directory: Folder of the bundle.
        base: Where the weights of the base lie on a hub; None = a copy goes into the bundle, which then predicts alone.
        access: The hub, for a base that is a reference.

    Raises:
        ConfigError: There is something else than a bundle in `directory`, or the licence of the card grants more than
            those of base and corpora.
        ContractError: The base on the hub is not the one of the run.
    """
    return save_draft(draft_of_run(result, base), directory, access=access)


def save_draft(draft: Draft, directory: Path | str, *, access: Access = ANYBODY) -> Bundle:
    """Bundle written from a draft and read back, as `write_bundle` does."""
    directory = Path(directory)
    check_place(directory, MANIFEST_FILE, noun="bundle")
    with replaced_folder(directory) as temporary:
        write_draft(draft, temporary)
        load_bundle(temporary, access=access)  # fail now, not at a stranger's
    return load_bundle(directory, access=access)
