"""Verbs about what a pretraining run will read, before it starts: mix, simulate."""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from jobs.console import console, show_table
from jobs.trainer_verbs import ConfigPath, Overrides
from manifests.config import load_config

Json = typer.Option(False, "--json", help="One JSON object for other programs.")
GB = 1e9


def mix(config: Path = ConfigPath, overrides: list[str] = Overrides, as_json: bool = Json) -> None:
    """Show who takes part in a run's batches: per corpus its epoch, share, quota and how often each sample is seen.

    Under a curriculum there is a table per stretch of steps. Nothing is read but the index of the snapshots.

    Example: kymo mix jobs/configs/pretrain_sleep.yaml steps=20000
    """
    from trainer.config import PretrainConfig
    from trainer.simulate import mix_rows, order_of

    settings = load_config(PretrainConfig, config, overrides or ())
    rows = mix_rows(settings, order_of(settings))
    if as_json:
        console.print_json(json.dumps([asdict(row) for row in rows]))
        return
    columns = ("corpus", "samples", "hours", "weight", "share", "quota", "repeats", "total repeats")
    for begin, end in dict.fromkeys((row.from_step, row.to_step) for row in rows):
        own = [row for row in rows if row.from_step == begin]
        table = [
            (
                row.corpus,
                f"{row.samples:,}",
                f"{row.hours:,.1f}",
                f"{row.weight:,g}",
                f"{row.share:.2%}",
                row.quota,
                row.repeats,
                row.total_repeats,
            )
            for row in own
        ]
        samples, hours = sum(row.samples for row in own), sum(row.hours for row in own)
        show_table(f"steps {begin:,} to {end:,}: {samples:,} samples, {hours:,.1f} h", columns, table)
    console.print(f"a global batch has {settings.global_batch} samples; `repeats` counts this stretch of steps alone")


def simulate(
    config: Path = ConfigPath,
    overrides: list[str] = Overrides,
    windows_per_s: float = typer.Option(0.0, help="Speed of a node's training, windows/s; 0: by --hours-per-hour."),
    hours_per_hour: float = typer.Option(
        28_800.0, help="Speed as hours of signal in an hour, all GPUs of a node; SleepFM's on an A100 by default."
    ),
    cache_gb: list[float] = typer.Option([], help="Size of a cache to try; may be given several times."),
    steps: int = typer.Option(1000, min=1, help="Steps to play against the caches."),
    disk_mb_s: float = typer.Option(0.0, help="Speed of the disk; 0: measure it by reading at most 1 GB of shards."),
    as_json: bool = Json,
) -> None:
    """Predict what a run asks of disk, network and cache, from the index of its snapshots alone.

    The order of samples is a function of position, so the shards that every step touches are known: the table plays
    them against caches of some sizes. `downloads per shard` is 1 when each is fetched once; more is thrashing.

    Example: kymo simulate jobs/configs/pretrain_sleep.yaml --windows-per-s 2000 --cache-gb 200
    """
    from trainer import simulate as simulation
    from trainer.config import PretrainConfig

    settings = load_config(PretrainConfig, config, overrides or ())
    order = simulation.order_of(settings)
    found = simulation.simulate(
        settings,
        order,
        windows_per_s=windows_per_s or simulation.windows_per_s(order, hours_per_hour=hours_per_hour),
        cache_bytes=[round(size * GB) for size in cache_gb],
        steps=steps,
        disk_mb_s=disk_mb_s or simulation.measure_disk(order),
    )
    if as_json:
        console.print_json(json.dumps(asdict(found)))
        return
    disk = "" if found.disk_mb_s is None else f"; the disk gives {found.disk_mb_s:,.0f} MB/s"
    rows = [
        ("an epoch", f"{found.epoch_samples:,} samples, {found.epoch_hours:,.1f} h"),
        (
            "a step",
            f"{found.bytes_per_step / 1e6:,.1f} MB in {found.step_s:.3f} s at {found.windows_per_s:,.0f} windows/s"
            + ("" if windows_per_s else f", which {hours_per_hour:,.0f} hours of signal in an hour are"),
        ),
        ("read", f"{found.read_mb_s:,.1f} MB/s of whole windows{disk}"),
        ("hot shards", f"{found.hot_shards:,}, {found.hot_bytes / GB:,.2f} GB"),
        ("cache needed", f"{found.needed_bytes / GB:,.2f} GB"),
    ]
    show_table("what the run reads", ("what", "how much"), rows)
    columns = ("cache GB", "hit rate", "downloads per shard", "download MB/s", "fits")
    show_table(
        f"caches of a snapshot in an object store, {found.steps:,} steps",
        columns,
        [
            (c.cache_bytes / GB, f"{c.hit_rate:.2%}", c.downloads_per_shard, c.download_mb_s, "yes" if c.fits else "no")
            for c in found.caches
        ],
    )
    if found.disk_mb_s is not None and found.read_mb_s > found.disk_mb_s:
        console.print("[yellow]the disk is slower than the training reads[/]: expect to wait for data", soft_wrap=True)
