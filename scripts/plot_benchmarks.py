"""Draw what docs/benchmarks.md shows, from the kept rows alone, and put it between the page's marks.

python scripts/plot_benchmarks.py       writes docs/benchmarks/*.png, and docs/benchmarks.md between its marks

A picture whose rows nobody has measured is not drawn, and the page says which command measures them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_points import ablations, first_token, many
from speed_points.peers import CLAIMS, Claim
from speed_points.text_records import RECORDS, Row, newest, said
from tested import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- begin: scripts/plot_benchmarks.py -->", "<!-- end: scripts/plot_benchmarks.py -->"

OURS, OTHERS = "#1f6f8b", "#b8b8b8"

Bars = Sequence[tuple[str, float, tuple[float, float] | None, bool]]
"""(label, value, least and most, whether it is ours)."""


def main(records: Path = RECORDS, page: Path = PAGE, pictures: Path = PICTURES) -> None:
    pictures.mkdir(exist_ok=True)
    parts = [
        part for draw in (_claims, _adapters, _ablations, _first_tokens) for part in draw(records, pictures)
    ]
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{page} lacks the marks {BEGIN} and {END}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    drawn = "\n".join([BEGIN, "", *parts, END])
    page.write_text(before + drawn + after, encoding="utf-8")


def _claims(records: Path, pictures: Path) -> list[str]:
    """Tokens a second beside the peers, a picture for each run."""
    parts = []
    for claim in CLAIMS:
        row = newest(peers=tuple(claim.bounds), folder=records, **claim.settings)
        if row is None:
            parts.append(_unmeasured(claim.what, claim.command))
            continue
        file = (
            pictures
            / f"{claim.command.rpartition('/')[2].removesuffix('.sh')}-{claim.settings['dtype']}.png"
        )
        _draw_bars(file, _bars_of(row), "output tokens a second", claim.what)
        parts += [_picture(claim.what, file), *_table(claim, row)]
    return parts


def _bars_of(row: Row) -> Bars:
    own = [("manylora", row["tokens_per_s"], tuple(row["tokens_per_s_range"]), True)]
    if row["config"]["adapters"]:
        own.append(
            ("manylora, no adapters", row["base_tokens_per_s"], tuple(row["base_tokens_per_s_range"]), True)
        )
    return own + [
        (name, peer["tokens_per_s"], tuple(peer["tokens_per_s_range"]), False)
        for name, peer in row["peers"].items()
    ]


def _table(claim: Claim, row: Row) -> list[str]:
    machine = row["machine"]
    lines = [
        f"{said(row)}; {machine['cpu']}, {row['threads']} threads, {row['dtype']}. Again: `{claim.command}`.",
        "",
        "| | tokens/s | least - most | we are | answers equal to ours | |",
        "|---|---|---|---|---|---|",
    ]
    for label, rate, (least, most), _ in _bars_of(row)[: 1 + bool(row["config"]["adapters"])]:
        lines.append(f"| {label} | {rate:.0f} | {least:.0f} - {most:.0f} | | | |")
    for name, peer in row["peers"].items():
        least, most = peer["tokens_per_s_range"]
        lines.append(
            f"| {name}, batch {peer['batch']} | {peer['tokens_per_s']:.0f} | {least:.0f} - {most:.0f} | "
            f"{peer['speedup']:.2f}x | {peer['equal_outputs']:.0%} | {peer['note']} |"
        )
    return [*lines, ""]


def _adapters(records: Path, pictures: Path) -> list[str]:
    """Tokens a second over the number of adapters registered, of which the pool holds 256."""
    what, command = "Throughput over the number of adapters registered", many.COMMAND
    rows = [newest(folder=records, adapters=n, **many.SETTINGS) for n in (many.FEW, many.SOME, many.MANY)]
    measured = [row for row in rows if row is not None]
    if len(measured) < 2:
        return [_unmeasured(what, command)]
    figure = _figure()
    axes = figure.subplots()
    counts = [row["config"]["adapters"] for row in measured]
    axes.plot(
        counts, [row["tokens_per_s"] for row in measured], marker="o", color=OURS, label="with adapters"
    )
    axes.plot(
        counts,
        [row["base_tokens_per_s"] for row in measured],
        marker="o",
        color=OTHERS,
        label="base alone, same runs",
    )
    axes.set(
        xscale="log",
        xlabel="adapters registered; the pool holds 256",
        ylabel="output tokens a second",
        title=what,
        ylim=(0, None),
    )
    axes.legend()
    file = pictures / "many_adapters.png"
    figure.savefig(file, dpi=120)
    told = "384 requests; adapters are read while others are served"
    return [_picture(what, file), f"{said(measured[-1])}; {told}. Again: `{command}`.", ""]


def _ablations(records: Path, pictures: Path) -> list[str]:
    """What is left of our rate without each idea."""
    what = "What each idea brings"
    bars: list[tuple[str, float, tuple[float, float] | None, bool]] = []
    for without, settings in ablations.RUNS:
        row = newest(without=without, folder=records, **settings)
        if row is not None:
            bars += [(f"without {n}", 1 / row["without"][n]["speedup"], None, False) for n in without]
    if not bars:
        return [_unmeasured(what, ablations.COMMAND)]
    file = pictures / "ablations.png"
    _draw_bars(
        file,
        [("the whole engine", 1.0, None, True), *bars],
        "tokens a second, as a share of the whole's",
        what,
    )
    return [_picture(what, file), f"Again: `{ablations.COMMAND}`.", ""]


def _first_tokens(records: Path, pictures: Path) -> list[str]:
    what = "First token of an adapter never read"
    bars: list[tuple[str, float, tuple[float, float] | None, bool]] = []
    for dtype in first_token.DTYPES:
        record = first_token.newest(dtype, records)
        for kind in ("warm", "cold") if record else ():
            for percentile in ("p50", "p99"):
                seconds = record[kind][f"{percentile}_s"]
                bars.append((f"{dtype}, {kind}, {percentile}", 1000 * seconds, None, kind == "cold"))
    if not bars:
        return [_unmeasured(what, first_token.COMMAND)]
    file = pictures / "first_token.png"
    _draw_bars(file, bars, "ms from handing in to the first token", what)
    return [_picture(what, file), f"Again: `{first_token.COMMAND}`.", ""]


def _unmeasured(what: str, command: str) -> str:
    return f"**{what}**: not measured yet; `{command}`.\n"


def _picture(what: str, file: Path) -> str:
    return f"**{what}**\n\n![{what}](benchmarks/{file.name})\n"


def _draw_bars(file: Path, bars: Bars, label: str, title: str) -> None:
    figure = _figure(height=1.2 + 0.4 * len(bars))
    axes = figure.subplots()
    names, values = [bar[0] for bar in bars], [bar[1] for bar in bars]
    axes.barh(names, values, color=[OURS if ours else OTHERS for *_, ours in bars])
    for place, (_, value, spread, _) in enumerate(bars):
        axes.text(value, place, f" {value:.3g}", va="center")
        if spread is not None:
            axes.plot(spread, (place, place), color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.margins(x=0.12)
    figure.savefig(file, dpi=120)


def _figure(height: float = 4.0) -> Any:
    # Not through pyplot: nobody looks at a screen, and there may be none.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


if __name__ == "__main__":
    main()
