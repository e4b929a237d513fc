"""How `kymo scan` looks: what lies in a folder, what cannot be used, and what the corpus file lacks."""

from typing import TYPE_CHECKING

from rich.markup import escape

from jobs.console import console, show_table
from manifests.errors import ConfigError

if TYPE_CHECKING:
    from engine.scan_result import ScanResult


def show_survey(result: "ScanResult", *, limit: int, is_whole: bool) -> None:
    """All that a survey found, tables of at most `limit` rows (0: all); `is_whole` unless it was of one recording.

    Raises:
        ConfigError: There are recordings whose subject cannot be read; they are listed before.
    """
    show_scan(result.corpus_rows(), result.channel_rows(), result.rate_rows(), limit=limit)
    unresolved = [tuple(row.values()) for row in result.unresolved_rows()]
    _show_first(f"labels without a channel ({len(unresolved)})", ("label", "reason", "recordings"), unresolved, limit)
    refused = [(row["path"], row["reason"], row["message"]) for row in result.unreadable_rows()]
    _show_first(f"recordings that cannot be read ({len(refused)})", ("path", "reason", "message"), refused, limit)
    if result.corpora:
        _show_gaps(result, limit=limit, is_whole=is_whole)
    if result.skipped:
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in result.skipped.most_common())
        whose = f"{', '.join(result.corpora)}.yaml does not take" if result.corpora else "no reader knows"
        console.print(f"files that {whose}: {result.skipped.total():,} ({escape(kinds)})", soft_wrap=True)
    for name, paths in result.nobodys.items():
        if paths:
            _show_first(f"recordings of nobody ({len(paths)})", ("path",), [(path,) for path in paths], limit)
            raise ConfigError(
                f"{name}.yaml: subject.pattern '{result.corpora[name].subject.pattern}' does not match {len(paths)} of "
                f"{len(paths) + len(result.rows)} recordings; widen the pattern or exclude them"
            )


def _show_first(title: str, columns: tuple[str, ...], cells: list[tuple], limit: int) -> None:
    """A table of the first `limit` rows (0: all), and below it how many are not shown."""
    show_table(title, columns, cells[: limit or None])
    if limit and len(cells) > limit:
        console.print(f"… and {len(cells) - limit} more rows of {title.partition(' (')[0]}; --limit 0 shows all")


def show_scan(corpora: list[dict], channels: list[dict], rates: list[dict], *, limit: int = 0) -> None:
    """Tables of a scan: totals against what the corpus expects, channels by symbol, native rates."""
    totals = []
    for row in corpora:
        differs = ", ".join(f"{key}: {row['expected'][key]} expected" for key in row["differs"])
        name = row["corpus"] or "(no corpus)"
        cells = (row["subjects"], row["recordings"], row["hours"], row["unreadable"], row["megabytes"])
        totals.append((name, *cells, differs))
    names = ("corpus", "subjects", "recordings", "hours", "unreadable", "MB", "differs")
    width = len(names) if any(row["differs"] for row in corpora) else len(names) - 1
    show_table("corpora", names[:width], [row[:width] for row in totals])
    columns = ("symbol", "kind", "recordings", "share", "hours", "rates in Hz", "units")
    cells = [
        (
            row["symbol"],
            row["kind"],
            row["recordings"],
            f"{row['share']:.0%}",
            row["hours"],
            " ".join(f"{rate:g}" for rate in row["rates_hz"]),
            " ".join(unit or "(none)" for unit in row["units"]),
        )
        for row in channels
    ]
    _show_first("channels", columns, cells, limit)
    by_rate = [(row["kind"], f"{row['rate_hz']:g}", row["channels"]) for row in rates]
    _show_first("rates", ("kind", "Hz", "channels"), by_rate, limit)


def _show_gaps(result: "ScanResult", *, limit: int, is_whole: bool) -> None:
    """What the corpus file lacks: texts, units, labels; of a whole corpus also channels that no recording has."""
    from engine import scan_gaps

    texts = scan_gaps.unmapped_texts(result)
    shown = limit or len(texts)  # looking for the nearest takes long
    cells = [
        (
            *(row["text"], row["n"], row["recordings"]),
            scan_gaps.nearest_text(row["text"], result.corpora[row["corpus"]]) if place < shown else "",
        )
        for place, row in enumerate(texts)
    ]
    title = f"annotation texts that the corpus file does not map ({len(texts)})"
    _show_first(title, ("text", "n", "recordings", "nearest that it maps"), cells, limit)
    units = [
        (row["label"], row["symbol"], row["unit"] or "(none)", row["recordings"])
        for row in scan_gaps.unknown_units(result)
    ]
    title = f"channels left out until the corpus file declares their units ({len(units)})"
    _show_first(title, ("label", "symbol", "unit", "recordings"), units, limit)
    faults = [(row["path"], row["message"]) for row in scan_gaps.label_faults(result)]
    title = f"recordings that a conversion rejects for their labels ({len(faults)})"
    _show_first(title, ("path", "message"), faults, limit)
    for name, labels in scan_gaps.absent_channels(result).items() if is_whole else ():
        some = ", ".join(labels[: limit or None]) + (", …" if limit and len(labels) > limit else "")
        num_mapped = sum(symbol is not None for symbol in result.corpora[name].channels.values())
        text = f"channels that {name}.yaml maps and no recording has: {len(labels)} of {num_mapped} ({some})"
        console.print(escape(text), soft_wrap=True)
