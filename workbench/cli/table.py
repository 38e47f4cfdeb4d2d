"""What a folder of ours holds, as a table of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workbench.tracing.storage.disk import read_index
from workbench.tracing.storage.saved import SavedRecord, load_record
from workbench.tracing.storage.shards import FORMAT, INDEX, VERSION, Shard, read_shards


def table(folder: Path) -> str:
    """Return what a saved record or a data set of activations holds, from their JSON alone.

    Raises:
        StoreError: the folder holds neither.
    """
    return _of_dataset(folder) if (folder / INDEX).is_file() else _of_record(load_record(folder))


def size(count: int) -> str:
    """Spell a number of bytes: ``3.1 MB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _of_record(record: SavedRecord) -> str:
    ledger, asked = record.ledger, record.request
    prompt = asked["arguments"].get("prompt")
    lines = [
        f"record of  {asked['model'] or 'a live pipeline'}, seed {asked['seed']}",
        f"prompt     {', '.join(prompt) if isinstance(prompt, list) else prompt}",
        f"run        {ledger.steps} steps, {len(ledger)} calls, branches {', '.join(ledger.branches)}",
        "",
    ]
    rows = [(each.name, str(each.count), each.shape, size(each.bytes)) for each in record.holdings()]
    return "\n".join(lines + _columns([("holds", "count", "shape of one", "bytes"), *rows]))


def _of_dataset(folder: Path) -> str:
    index, shards = read_index(folder, INDEX, FORMAT, VERSION, what="a data set"), read_shards(folder)
    rows = [_site_row(each["site"], shards) for each in index["sites"]]
    runs = {run for shard in shards for run in shard.runs}
    total = size(sum(shard.bytes for shard in shards))
    head = f"data set of activations: {len(runs)} runs in {len(shards)} shards, {total}"
    return "\n".join([head, "", *_columns([("site", "rows", "shape of one"), *rows])])


def _site_row(site: str, shards: Sequence[Shard]) -> tuple[str, str, str]:
    kept = [shard.sites[site] for shard in shards if site in shard.sites]
    shapes = {f"{'×'.join(map(str, each.shape))} {each.dtype}" for each in kept}
    return site, str(sum(each.rows for each in kept)), ", ".join(sorted(shapes)) or "none yet"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows with their cells brought to the same width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
