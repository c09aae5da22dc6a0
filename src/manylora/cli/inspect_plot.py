"""The evidence of a verdict on pictures as one PNG: norms by site, cosines of pairs, the denoiser by noise level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manylora.cli.inspect_image import ImageInspection
from manylora.models.image_verdict import DIVERGENCE, PROMPT_DISAGREEMENT


def plot_inspection(found: ImageInspection, path: Path) -> None:
    """Write the plot; its folder is made where it is not there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    norms, pairs, levels = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _draw_norms(norms, found)
    _draw_pairs(pairs, found)
    _draw_levels(levels, found)
    figure.suptitle(f"{found.mixture}: {found.verdict.level}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_norms(axes: Any, found: ImageInspection) -> None:
    """Each site's relative norm, in the order of their names, so that those of a stage stand together."""
    sites = sorted(found.weights.sites, key=lambda site: site.site)
    axes.bar(range(len(sites)), [site.relative or 0.0 for site in sites], width=1.0)
    stages = [site.site.split(".")[0] for site in sites]
    starts = [i for i, stage in enumerate(stages) if i == 0 or stages[i - 1] != stage]
    axes.set_xticks(starts, [stages[i] for i in starts], rotation=30, ha="right", fontsize=7)
    axes.set(title="summed delta over the base weight, by site", ylabel="relative norm")


def _draw_pairs(axes: Any, found: ImageInspection) -> None:
    """Cosines above the diagonal, and below it what the column spaces share beyond chance."""
    names, size = found.weights.names, len(found.weights.names)
    values = [[0.0] * size for _ in names]
    for pair in found.weights.pairs:
        i, j = sorted((names.index(pair.first), names.index(pair.second)))
        values[i][j], values[j][i] = pair.cosine, pair.column_overlap
    axes.imshow(values, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    for i in range(size):
        for j in range(size):
            if i != j:
                axes.text(j, i, f"{values[i][j]:+.2f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(size), names, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(size), names, fontsize=7)
    axes.set_title("cosine (above), overlap less chance (below)")


def _draw_levels(axes: Any, found: ImageInspection) -> None:
    """How far predictions move at each noise level, by the mixture and by each part alone."""
    probe, places = found.probe, range(len(found.probe.timesteps))
    if len(probe.parts) > 1:
        for name, part in zip(found.names, probe.parts, strict=True):
            axes.plot(places, part.divergence_by_level, marker=".", linewidth=1, label=f"{name} alone")
    axes.plot(places, probe.mixture.divergence_by_level, marker="o", linewidth=2.5, label="mixture")
    axes.axhline(DIVERGENCE.broken, color="tab:red", linewidth=0.8)
    axes.set_xticks(places, [f"t={t}" for t in probe.timesteps])
    disagreement = probe.mixture.prompt_disagreement
    axes.set(
        title=f"difference to {probe.reference}; prompt disagreement {disagreement:.2f} "
        f"(broken above {PROMPT_DISAGREEMENT.broken:g})",
        ylabel="||x0 - x0_ref|| / ||x0_ref||",
    )
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7)
