"""Verbs of bundles: publish, and verify, show, add-task and merge of the group `bundle`."""

from contextlib import nullcontext
from pathlib import Path

import typer
from rich.markup import escape

from jobs.console import bytes_progress, console, show_table

BundleDir = typer.Argument(help="Folder of a bundle.", metavar="BUNDLE")


def publish(
    bundle: Path = BundleDir,
    target: str = typer.Argument(help="OWNER/NAME on the hub, or the URL of a folder, e.g. s3://lab/bundles."),
    tag: str | None = typer.Option(None, help="Version to tag, e.g. v1.0.0; a tag is never moved."),
    endpoint: str | None = typer.Option(None, help="Hub to publish to; default: the client's own."),
    private: bool = typer.Option(
        True, help="Who may read it; a store has rights of its own, say --no-private if public."
    ),
    confirm_rights: bool = typer.Option(
        False, "--confirm-rights", help="You hold the rights, or have their holders' consent."
    ),
    dry_run: bool = typer.Option(False, help="Show what would be sent; send nothing."),
) -> None:
    """Publish a bundle as one version: a commit and a tag on a model hub, or a folder in a store.

    The token is the hub client's own (HF_TOKEN, or `hf auth login`), the rights to a store are those of fsspec. After a
    failure the same command goes on where it stopped.

    Example: kymo publish demo/bundle my-lab/sleep-adapters --tag v1.0.0 --dry-run
    """
    from huggingface_hub.utils import disable_progress_bars

    from adapters.hub import Access
    from adapters.publish import publish as push

    if not console.is_terminal:
        disable_progress_bars()
    rights = {"tag": tag, "private": private, "confirm_rights": confirm_rights}
    plan = push(bundle, target, **rights, dry_run=True)
    total = sum(plan.files.values())
    show_table(str(bundle), ("file", "bytes"), [(name, f"{size:,}") for name, size in plan.files.items()])
    visibility = "private" if plan.is_private else "public"
    console.print(f"{len(plan.files)} files, {total:,} bytes; licence {plan.licence}; {visibility}", soft_wrap=True)
    for sentence in plan.rights:
        console.print(f"[yellow]rights:[/] {escape(sentence)}", soft_wrap=True)
    if dry_run:
        console.print(f"dry run, nothing was sent → {target}, tag {plan.tag}", soft_wrap=True)
        return
    # The hub's client draws bars of its own.
    with bytes_progress(target, total) if "://" in target else nullcontext() as advance:
        done = push(bundle, target, **rights, access=Access(endpoint=endpoint), progress=advance)
    for name in done.deleted:
        console.print(f"removed: {name}")
    sent = f"{len(done.uploaded)} files sent" if done.uploaded else "it was there already, nothing was sent"
    where = f", commit {done.commit}" if done.commit else ""
    console.print(f"{sent} → {target}@{done.tag}{where}", soft_wrap=True)


bundles = typer.Typer(
    help="Check a bundle, look at it, add tasks, merge one into its base.\n\nExample: kymo bundle show demo/bundle",
    no_args_is_help=True,
)
Source = typer.Argument(help="Folder of a bundle, or OWNER/NAME@VERSION on the hub.", metavar="BUNDLE")
TaskNames = typer.Option([], "--task", help="Only this task; repeatable.")


@bundles.command()
def verify(bundle: str = Source, task: list[str] = TaskNames) -> None:
    """Check every file, hold tasks, base and temporal encoder together, and compute what must come out again.

    That are the logits of stored windows and, before them, the windows that this installation's filters make of noise.

    Example: kymo bundle verify demo/bundle
    """
    from adapters.bundle import load_bundle
    from adapters.provenance import sources_of
    from adapters.source import bundle_folder
    from jobs.filter_vectors import check_filters
    from trainer.export import read_card

    loaded = load_bundle(bundle_folder(bundle, task or None), task or None)
    files, total = loaded.manifest.files, sum(entry.size for entry in loaded.manifest.files.values())
    console.print(f"{len(files)} files, {total:,} bytes: sizes and SHA-256 as bundle.json says")
    console.print(f"same logits as at its maker's: {', '.join(loaded.records)}", soft_wrap=True)
    checked = check_filters(loaded.path, loaded.records)
    console.print(f"same filtered signal as at its maker's: {', '.join(checked) or 'none'}", soft_wrap=True)
    if silent := [name for name in loaded.records if name not in checked]:
        console.print(f"[yellow]filters:[/] {', '.join(silent)} keep no signal to compare", soft_wrap=True)
    for source in sources_of(read_card(loaded.path / "base"), loaded.records):
        if not source.terms.adapted:
            console.print(f"[yellow]licence:[/] {escape(str(source))}", soft_wrap=True)


@bundles.command()
def show(bundle: str = Source) -> None:
    """Show tasks with scores, what a recording must have, sizes, base, licences and where it all comes from.

    Example: kymo bundle show demo/bundle
    """
    from adapters.layout import read_record, verify_bundle
    from adapters.source import bundle_folder
    from jobs.bundle_tables import show_bundle
    from trainer.export import read_card

    folder = bundle_folder(bundle)
    manifest = verify_bundle(folder)
    records = {name: read_record(folder, name, manifest) for name in manifest.tasks}
    show_bundle(bundle, manifest, read_card(folder / "base"), records)


@bundles.command("add-task")
def add_task(
    bundle: Path = BundleDir,
    source: Path = typer.Argument(help="YAML of an adapt run, or the folder of another bundle.", metavar="SOURCE"),
    overrides: list[str] = typer.Argument(None, help="key=value, e.g. steps=500", metavar="[KEY=VALUE]..."),
    out: Path = typer.Option(..., help="Folder of the new bundle; may be BUNDLE itself."),
) -> None:
    """Add tasks to a bundle: trained for it, or taken over. Those that it has stay as they are, byte by byte.

    A run trains on the bundle's base with its temporal encoder, both frozen; run the same command again to resume. The
    tasks of another bundle fit if it has the same base and temporal encoder.

    Example: kymo bundle add-task demo/bundle jobs/configs/adapt.yaml run_dir=demo/runs/more --out demo/bundle2
    """
    from adapters.config import AdaptConfig
    from adapters.merge import add_bundle, add_run, plan_addition
    from jobs.adapter_verbs import show_task_scores
    from jobs.filter_vectors import with_filters
    from jobs.learn import learn_adapters
    from manifests.config import load_config, read_yaml
    from trainer.collectives import rank

    if source.is_dir():
        grown = add_bundle(bundle, source, out)
    else:
        # A YAML needs no `encoder`; one that was made for `kymo adapt` serves, and its encoder tells whom it has seen.
        given = [*(overrides or ()), "temporal=frozen"]
        if not any(item.startswith("encoder=") for item in given) and "encoder" not in read_yaml(source):
            given.append("encoder=of the bundle")
        config = load_config(AdaptConfig, source, given)
        result = learn_adapters(plan_addition(bundle, config))
        if rank() != 0:
            return  # under torchrun one rank speaks for all
        show_task_scores(result.scores)
        grown = add_run(bundle, with_filters(result), out)
    console.print(f"bundle: {out} with {', '.join(grown.records)}", soft_wrap=True)


@bundles.command()
def merge(
    bundle: str = Source,
    task: str = typer.Argument(help="The task.", metavar="TASK"),
    out: Path = typer.Option(..., help="Folder of the merged model."),
) -> None:
    """Merge one task's adapter into the base: a whole encoder and a head, without PEFT, for serving.

    Refused where the licence of the base permits no derivatives.

    Example: kymo bundle merge demo/bundle sleep_staging --out demo/staging
    """
    from adapters.merge import merge_task
    from adapters.source import bundle_folder

    merge_task(bundle_folder(bundle, [task]), task, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    text = f"{task} merged into its base: {out}, {size:,} bytes, the same logits as with the adapter"
    console.print(text, soft_wrap=True)
