"""PEFT's adapter_config.json for LoRA: the sites it names and the scaling of each. Knows no tensor."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from manylora.errors import AdapterFormatError
from manylora.lora.peft_keys import refuse_keys
from manylora.lora.site_patterns import SitePatterns

Value = TypeVar("Value")

MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The keys that decide what an adapter computes."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    target_modules: str | tuple[str, ...] | None
    """A regex of whole sites, names of sites or of their ends, or None: PEFT chose them by the model."""

    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    base_model: str | None

    patterns: SitePatterns = field(compare=False, repr=False)
    """The regular expressions among these."""

    @property
    def key(self) -> Hashable:
        """Equal for configs that give every site the same: PEFT writes its lists of modules in any order."""
        modules = (self.target_modules, self.exclude_modules)
        return (
            (self.r, self.lora_alpha, self.use_rslora),
            (
                tuple(self.rank_pattern.items()),
                tuple(self.alpha_pattern.items()),
            ),  # the first that matches counts
            tuple(frozenset(names) if isinstance(names, tuple) else names for names in modules),
            (self.layers_to_transform, self.layers_pattern),
        )

    def rank(self, site: str) -> int:
        return self._look_up(self.rank_pattern, site, self.r)

    def scaling(self, site: str) -> float:
        alpha = self._look_up(self.alpha_pattern, site, self.lora_alpha)
        return scaling_of(alpha, self.rank(site), self.use_rslora)

    def why_not(self, site: str) -> str | None:
        """Say which key keeps PEFT from putting an adapter on `site`; None where none does.

        Source: `check_target_module_exists` in PEFT's tuners_utils.py.
        """
        if self.exclude_modules and self._names(self.exclude_modules, site):
            return f"exclude_modules {_show(self.exclude_modules)} names it"
        if self.target_modules is None:
            return None
        if not self._names(self.target_modules, site):
            return f"target_modules {_show(self.target_modules)} does not name it"
        # PEFT does not ask for the layer of a site that target_modules gives in full.
        if self.layers_to_transform and site not in self.target_modules:
            layer = self._layer(site)
            if layer not in self.layers_to_transform:
                shown = (
                    "and it has no layer that PEFT sees" if layer is None else f"without its layer, {layer}"
                )
                return f"layers_to_transform is {list(self.layers_to_transform)}, {shown}"
        return None

    def _layer(self, site: str) -> int | None:
        """The first number in the path that follows a module list, as PEFT counts layers."""
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<layer>\d+)\.", site)
            return int(match["layer"]) if match else None
        for name in self.layers_pattern:
            match = self.patterns.match(_LAYER_OF.format(name), site)
            if match:
                return int(match["layer"])
        return None

    def _look_up(self, pattern: Mapping[str, Value], site: str, default: Value) -> Value:
        """The value of the first key that matches the site or its end after a dot: PEFT's `get_pattern_key`."""
        for key, value in pattern.items():
            if self.patterns.match(_END.format(key), site):
                return value
        return pattern.get(site, default)

    def _names(self, modules: str | tuple[str, ...], site: str) -> bool:
        if isinstance(modules, str):
            return self.patterns.match(modules, site, whole=True) is not None
        return site in modules or any(site.endswith(f".{name}") for name in modules)


# How PEFT builds a text of the file into what it matches.
_END = r"(.*\.)?({})$"
_LAYER_OF = r"(?:^|.*?\.){}\.(?P<layer>\d+)\."


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rank stabilisation (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def parse_config(values: Mapping[str, Any], source: str) -> PeftConfig:
    """Read a config that came from JSON; `source` is how messages call the file.

    Raises:
        AdapterFormatError: naming the key, what it holds and what was expected.
    """
    refuse_keys(values, source)
    read = _Reader(values, source, SitePatterns(source))
    targets = read.modules("target_modules")
    config = PeftConfig(
        r=read.rank(values.get("r"), "r"),
        lora_alpha=read.alpha(values.get("lora_alpha"), "lora_alpha"),
        use_rslora=bool(values.get("use_rslora")),
        rank_pattern=read.pattern("rank_pattern", read.rank),
        alpha_pattern=read.pattern("alpha_pattern", read.alpha),
        # "all-linear" is PEFT's word for every Linear of the model.
        target_modules=None if isinstance(targets, str) and targets.lower() == "all-linear" else targets,
        exclude_modules=read.modules("exclude_modules") or (),
        layers_to_transform=read.layers("layers_to_transform"),
        layers_pattern=read.regexes("layers_pattern"),
        patterns=read.patterns,
        base_model=values.get("base_model_name_or_path"),
    )
    if isinstance(targets, str) and config.layers_to_transform:
        raise AdapterFormatError(
            f"{source}: layers_to_transform needs a list of target_modules, got {targets!r}"
        )
    return config


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one key at a time and refuses by name what is not of its kind."""

    values: Mapping[str, Any]
    source: str
    patterns: SitePatterns

    def rank(self, value: object, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AdapterFormatError(f"{self.source}: {key} must be a whole number above 0, got {value!r}")
        return value

    def alpha(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_FLOAT:
            raise AdapterFormatError(f"{self.source}: {key} must be a finite number, got {value!r}")
        return value

    def pattern(self, key: str, read: Callable[[object, str], Value]) -> dict[str, Value]:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise AdapterFormatError(f"{self.source}: {key} must map names to numbers, got {value!r}")
        for name in value:
            self.patterns.add(_END.format(name), key, name)
        return {name: read(number, f"{key}[{name!r}]") for name, number in value.items()}

    def modules(self, key: str) -> str | tuple[str, ...] | None:
        value = self.values.get(key)
        if isinstance(value, str):
            self.patterns.add(value, key, value)
            return value
        return None if value is None else self.names(key)

    def layers(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        layers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(layer, int) for layer in layers):
            raise AdapterFormatError(f"{self.source}: {key} must be one or more layers, got {value!r}")
        return tuple(layers)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterFormatError(
                f"{self.source}: {key} must be a name or a list of names, got {value!r}"
            )
        return tuple(names)

    def regexes(self, key: str) -> tuple[str, ...]:
        names = self.names(key)
        for name in names:
            self.patterns.add(_LAYER_OF.format(name), key, name)
        return names


def _show(modules: str | tuple[str, ...]) -> str:
    return repr(modules) if isinstance(modules, str) else str(sorted(modules))


def config_for(
    sites: Mapping[str, tuple[int, float]], base_model: str | None, label: str
) -> dict[str, Any]:
    """Return the config that gives each site exactly its (rank, scaling), in PEFT as here.

    Raises:
        AdapterFormatError: no alpha gives a site its scaling, in either of PEFT's two ways to compute it.
    """
    use_rslora, alphas = _exact_alphas(sites, label)
    ranks = {site: rank for site, (rank, _) in sites.items()}
    [(r, _)] = Counter(ranks.values()).most_common(1)
    [(lora_alpha, _)] = Counter(alphas.values()).most_common(1)
    # A bare name is the end of any path too ("0" of "layers.0"); a path from the root is met once in a model.
    paths = all("." in site for site in sites)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {_only(site): rank for site, rank in ranks.items() if rank != r},
        "alpha_pattern": {_only(site): alpha for site, alpha in alphas.items() if alpha != lora_alpha},
        "target_modules": list(sites) if paths else "|".join(re.escape(site) for site in sites),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
    }


def _only(site: str) -> str:
    """A pattern that PEFT's rule matches with this site and no other."""
    return f"^{re.escape(site)}"


def _exact_alphas(sites: Mapping[str, tuple[int, float]], label: str) -> tuple[bool, dict[str, float]]:
    """use_rslora and the alpha of each site; where both ways are exact, the one with more whole numbers."""
    answers = [(use_rslora, _alphas(sites, use_rslora)) for use_rslora in (False, True)]
    exact = [(use_rslora, alphas) for use_rslora, alphas in answers if len(alphas) == len(sites)]
    if not exact:
        _, alphas = answers[0]
        site, (rank, scaling) = next((site, of) for site, of in sites.items() if site not in alphas)
        raise AdapterFormatError(
            f"{label}, site '{site}': PEFT's config holds alphas, and no alpha / {rank} is {scaling!r} to the "
            f"last bit; {scaling_of(scaling * rank, rank, False)!r} can be saved"
        )
    return max(exact, key=lambda answer: sum(isinstance(alpha, int) for alpha in answer[1].values()))


def _alphas(sites: Mapping[str, tuple[int, float]], use_rslora: bool) -> dict[str, float]:
    """The alphas of the sites that have an exact one."""
    alphas = {site: exact_alpha(scaling, rank, use_rslora) for site, (rank, scaling) in sites.items()}
    return {site: alpha for site, alpha in alphas.items() if alpha is not None}


def exact_alpha(scaling: float, rank: int, use_rslora: bool) -> float | None:
    """The alpha from which `scaling_of` gives `scaling` to the last bit; an int where it is whole."""
    near = scaling * (math.sqrt(rank) if use_rslora else rank)
    if math.isinf(near):
        return None
    for alpha in (round(near), near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf)):
        if scaling_of(alpha, rank, use_rslora) == scaling:
            return alpha
    return None
