"""Measures which sets of LoRAs break few-step pictures of the icons base, and how well `manylora inspect` foresees it.

    python scripts/mixture_breaks.py --base BASE --loras LORAS --judge JUDGE --prompts HELD_OUT --real HELD_OUT ...
    python scripts/mixture_breaks.py --repair (the same)      what becomes of the broken sets with the weights proposed

Random sets of one to eight LoRAs, each beside the acceleration LoRA at weight 1, in two halves: "fit", on which the
thresholds of models/image_verdict.py were chosen, and "held", which only checks them. Each set draws one picture of
every caption; a picture is good if the frozen judge sees its prompt's name first and its features lie among those of
real pictures of all looks. Beside that, what the probe and the weights alone say.

Rows are kept in docs/data/mixture_breaks.json as they are measured, and a killed run goes on where it stopped. With 160
sets of 100 pictures some 25 minutes on one core, the repair ten more. scripts/mixture_breaks_report.py makes the tables
and the plot of docs/diagnosis.md from the rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manylora.bench.image.accelerators import Accelerator, read_accelerator
from manylora.bench.image.judge import Judge, Verdict, load_judge
from manylora.bench.image.metrics import prompt_hits, within_manifold
from manylora.bench.image.prompts import PromptSet, choose_prompts, read_pictures, read_rows
from manylora.diffusion import last_latent
from manylora.image.adapters import DiffusionModel
from manylora.image.noise import SeededNoise
from manylora.image.params import ImageParams
from manylora.image.sampler import sample, timesteps_of
from manylora.lora.adapter import Adapter
from manylora.lora.convert import load_adapter
from manylora.lora.diagnose import BaseNorm, diagnose_weights, svd_of_pair
from manylora.lora.mixture import Mixture
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
from manylora.models.diffusion_norms import module_norms
from manylora.models.image_probe import ImageProbe
from manylora.models.image_repair import LIMIT, MIN_FACTOR, repair
from manylora.models.image_verdict import DIVERGENCE, PROMPT_DISAGREEMENT
from manylora.training.aside import write_text_aside
from merged_rows import MergedRows, refuse_if_unlike

DATA = Path(__file__).parent.parent / "docs/data/mixture_breaks.json"
MAX_ADAPTERS = 8
MIN_LORAS = 10
SEED = 1
STRENGTHS = (0.2, 1.2)
"""Of a set: its weights lie within 0.6 to 1.4 times it."""

BROKEN_BELOW, STRAINED_BELOW = 0.7, 0.85
"""Share of good pictures over that of the acceleration LoRA alone. Fixed before anything was measured."""

BATCH = 50

Row = dict[str, Any]
"""What was measured of one set, as the data file holds it."""


@dataclass(frozen=True)
class Case:
    """One set to measure."""

    group: str
    mixture: Mixture

    @property
    def key(self) -> str:
        return f"{self.group} {self.mixture}"


def cases(names: Sequence[str], num_sets: int) -> Iterator[Case]:
    """Random sets, as many of each size in either half; the first so many are the same however many follow."""
    for number in range(num_sets):
        draw = random.Random(f"{SEED}/{number}")
        size = 1 + number % min(MAX_ADAPTERS, len(names))
        group = "fit" if number // MAX_ADAPTERS % 2 == 0 else "held"
        strength = draw.uniform(*STRENGTHS)
        chosen = draw.sample(sorted(names), size)
        weights = ((name, round(strength * draw.uniform(0.6, 1.4), 2)) for name in chosen)
        yield Case(group, Mixture(tuple(weights)))


class Bench:
    """The base with all LoRAs at hand, the prompts, and who judges."""

    def __init__(
        self,
        base: DiffusionBase,
        adapters: Mapping[str, Adapter],
        fast: Accelerator,
        judge: Judge,
        prompts: PromptSet,
        real: Sequence[Path],
    ) -> None:
        self.base, self.adapters, self.fast, self.judge, self.prompts = base, adapters, fast, judge, prompts
        model = DiffusionModel(base)
        sites = {site for adapter in adapters.values() for site in adapter.sites}
        self.norms: dict[str, BaseNorm] = module_norms(model, sites)
        self.merged = MergedRows(base, adapters)
        self.probe = ImageProbe(base, self.merged, fast.name)
        self.subjects = [judge.subjects(names) for names in prompts.subjects]
        self.real = np.concatenate([_features(judge, folder, base.default_size) for folder in real])

    def pictures(self, mixture: Mixture) -> dict[str, float]:
        """Draw every prompt with a set beside the acceleration LoRA; what share is good, and why."""
        verdict = self._verdict(Mixture((*mixture.weights, (self.fast.name, 1.0))))
        hits = prompt_hits(verdict.names, self.subjects)
        real = within_manifold(verdict.features, self.real)
        return {
            "good": float((hits * real).mean()),
            "accuracy": float(hits.mean()),
            "real": float(real.mean()),
        }

    def measure(self, case: Case) -> Row:
        weights = dict(case.mixture.weights)
        return {
            "key": case.key,
            "group": case.group,
            "weights": weights,
            **_rounded(self.pictures(case.mixture)),
            "probe": _rounded(asdict(self.probe.result(case.mixture))),
            **_rounded(self._of_weights(weights)),
        }

    def repaired(self, row: Row) -> Row:
        """What becomes of a broken set with the weights that are proposed for it."""
        proposed = repair(self.probe, row["weights"])
        return {
            "weights": dict(proposed.mixture.weights),
            "factor": round(proposed.factor, 4),
            "mends": proposed.mends,
            **_rounded(self.pictures(proposed.mixture)),
        }

    def _of_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        parts = [self.adapters[name] for name in weights]
        found = diagnose_weights(parts, list(weights.values()), self.norms)
        norms = {part.name: _norm(part) for part in parts}
        return {
            "summed_norm": sum(abs(weight) * norms[name] for name, weight in weights.items()),
            "norm": found.frobenius,
            "relative_norm": found.relative or 0.0,
            "max_relative_norm": found.max_relative or 0.0,
            "max_cosine": max((abs(pair.cosine) for pair in found.pairs), default=0.0),
            "max_overlap": max((pair.column_overlap for pair in found.pairs), default=0.0),
        }

    @torch.inference_mode()
    def _verdict(self, mixture: Mixture) -> Verdict:
        parts, prompts, base = [], self.prompts, self.base
        params = ImageParams(sampler=self.fast.sampler, steps=self.fast.steps_near(4))
        timesteps = timesteps_of(params, base.schedule.num_timesteps)
        for start in range(0, len(prompts), BATCH):
            rows = slice(start, start + BATCH)
            captions, noise = prompts.captions[rows], SeededNoise(prompts.seeds[rows])
            with self.merged.rows([mixture] * len(captions)):
                denoise = base.denoiser(base.encode_prompts(captions))
                z = noise(torch.empty(len(captions), *base.latent_shape()))
                latents = last_latent(
                    sample(self.fast.sampler, denoise, base.schedule, z, timesteps, noise)
                )
            # What overflowed is judged as what it looks like: nothing.
            parts.append(self.judge.verdict(base.decode_latents(latents.nan_to_num(0.0, 0.0, 0.0))))
        return Verdict.cat(parts)


def measure_all(bench: Bench, file: Path, num_sets: int, about: Mapping[str, Any]) -> None:
    """Measure the sets that `file` has not yet, and write it after each."""
    kept = _read(file)
    if any(kept.get(name) != value for name, value in about.items()):
        kept = {**about, "rows": []}
    names = [name for name in bench.adapters if name != bench.fast.name]
    if "reference" not in kept:
        kept["reference"] = _rounded(bench.pictures(Mixture(())))
        print(f"the acceleration LoRA alone: {kept['reference']}", flush=True)
    done = {row["key"] for row in kept["rows"]}
    missing = [case for case in cases(names, num_sets) if case.key not in done]
    for number, case in enumerate(missing, 1):
        row = bench.measure(case)
        kept["rows"].append(row)
        _write(file, kept)
        seen = row["probe"]["mixture"]
        print(
            f"{number}/{len(missing)} good {row['good']:.2f} disagreement {seen['prompt_disagreement']:.2f} "
            f"difference {seen['divergence']:.2f} {case.key}",
            flush=True,
        )


def repair_all(bench: Bench, file: Path) -> None:
    """Repair every broken set of the half that is held out, by the thresholds of today."""
    kept = _read(file)
    by = [asdict(PROMPT_DISAGREEMENT), asdict(DIVERGENCE), {"limit": LIMIT, "min_factor": MIN_FACTOR}]
    if kept.get("repaired_by") != by:
        kept["repaired_by"] = by
        for row in kept["rows"]:
            row.pop("repair", None)
    limit = BROKEN_BELOW * kept["reference"]["good"]
    broken = [row for row in kept["rows"] if row["group"] == "held" and row["good"] < limit]
    for number, row in enumerate(broken, 1):
        if "repair" not in row:
            row["repair"] = bench.repaired(row)
            _write(file, kept)
            told = row["repair"]
            print(
                f"{number}/{len(broken)} good {row['good']:.2f} -> {told['good']:.2f}, factor {told['factor']:.2f}, "
                f"{row['key']}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--loras", type=Path, required=True, help="folder that holds them, a folder each")
    parser.add_argument("--names", nargs="+", required=True, help=f"of the LoRAs, {MIN_LORAS} at least")
    parser.add_argument("--fast", default="lcm", help="the acceleration LoRA, in the same folder")
    parser.add_argument("--judge", type=Path, required=True, help="a judge that has seen every style")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="held-out pictures whose captions are drawn"
    )
    parser.add_argument(
        "--real", type=Path, nargs="+", required=True, help="held-out pictures of all looks"
    )
    parser.add_argument("--num-sets", type=int, default=160)
    parser.add_argument("--num-pictures", type=int, default=100)
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if len(options.names) < MIN_LORAS:
        parser.error(f"--names: {MIN_LORAS} LoRAs at least, got {len(options.names)}")
    bench, about = _open(options)
    if options.repair:
        repair_all(bench, options.data)
    else:
        measure_all(bench, options.data, options.num_sets, about)


def _open(options: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    names = [*options.names, options.fast]
    adapters = {name: load_adapter(options.loras / name, name) for name in names}
    base, judge = load_diffusion_base(options.base), load_judge(options.judge)
    fast = read_accelerator(options.loras, options.fast)
    prompts = choose_prompts(read_rows(options.prompts), options.num_pictures, 1, SEED)
    bench = Bench(base, adapters, fast, judge, prompts, options.real)
    away = refuse_if_unlike(base, bench.merged, Mixture(((names[0], 0.8), (options.fast, 1.0))))
    print(f"merged weights and attached adapters differ by {away:.1g}", flush=True)
    about = {
        "base_hash": base.content_hash(),
        "judge": judge.sha256[:16],
        "adapters": {name: adapter.identity[:16] for name, adapter in adapters.items()},
        "fast": asdict(fast),
        "num_pictures": options.num_pictures,
        "num_real": len(bench.real),
    }
    return bench, json.loads(json.dumps(about))


def _features(judge: Judge, folder: Path, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return judge.verdict(read_pictures(folder, read_rows(folder), size)).features


def _norm(adapter: Adapter) -> float:
    return float(np.linalg.norm([svd_of_pair(pair).frobenius for pair in adapter.sites.values()]))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(of) for of in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _read(file: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return kept


def _write(file: Path, kept: Mapping[str, Any]) -> None:
    lines = ",\n  ".join(json.dumps(row) for row in kept["rows"])
    head = json.dumps({key: value for key, value in kept.items() if key != "rows"})
    write_text_aside(file, f'{head[:-1]}, "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
