"""Settings of `manylora bench image`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import ConfigError
from manylora.lora.mixture import Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBenchConfig:
    base: str
    """Model whose pictures are judged: a diffusers folder or hub id."""

    judge: Path
    """Folder of the judge: the classifier, trained on real pictures only, in whose features sets are compared."""

    data: Path
    """Held-out real pictures: a folder with metadata.jsonl (file_name, text, subjects, kind). Their captions are the
    prompts, the pictures what generated ones are compared with."""

    train_data: Path | None = None
    """Pictures for the rows "real pictures" and "through the VAE", which say what a perfect model would get. None: no
    such rows."""

    table: Literal["sweep", "steps", "close", "full", "universal", "ranks", "weights"] = "steps"
    """sweep: the teacher's guidance; steps: few steps with and without the LoRA; close: of these the guided rows at the
    steps of the LoRAs distilled by phases, for more pictures (num_seeds) than all rows can have, and without paired
    distances; full: the LoRA beside all weights distilled; universal: the LoRA beside styles and in another base;
    ranks: the LoRA cut to smaller ranks; weights: each style's weight against the LoRA's."""

    guidance: float = 2.5
    """The teacher's guidance scale, which is w + 1 of the distillation."""

    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    """Scales of the sweep."""

    loras: Path | None = None
    """Folder of LoRAs."""

    lcm: str = "lcm"
    """Name of the LCM-LoRA in it."""

    phased: tuple[str, ...] = ()
    """LoRAs in it that were distilled by phases, NAME or NAME:WEIGHT, each for as many steps as it has: more rows of
    the tables `steps`, `close`, `universal` and `ranks`."""

    ranks: tuple[int, ...] = (8, 4, 2, 1)
    """To which the table `ranks` cuts each acceleration LoRA, by its singular values."""

    retrained: tuple[str, ...] = ()
    """Names of acceleration LoRAs that were distilled at a small rank: more rows of the table `ranks`."""

    style_weights: tuple[float, ...] = (0.0, 0.4, 0.8, 1.2)
    """Rows of the map of weights."""

    lcm_weights: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """Columns of the map of weights, at 4 steps."""

    styles: tuple[str, ...] = ()
    """Names of style LoRAs in it; the style judge knows them by these names."""

    style_judge: Path | None = None
    """Folder of the judge that tells styles apart; the table `universal` needs it."""

    finetuned: str = ""
    """A base that was fine-tuned on something else: the LoRA runs in it untouched."""

    finetuned_look: str | None = None
    """The style that the fine-tuned base has, by the style judge."""

    full: str = ""
    """A base with all weights distilled; the table `full` needs it."""

    num_prompts: int = 250
    """Distinct captions."""

    num_seeds: int = 2
    """Pictures of each."""

    chance: Literal["prompts", "seeds"] = "prompts"
    """What the intervals draw again. prompts: they hold for other prompts of the same kind. seeds: they hold for these
    prompts, and are right where these are all that the model knows; wants 3 pictures or more of each."""

    seed: int = 0
    """Of the pictures' seeds and of the intervals' resamples."""

    batch: int = 32
    """Pictures of one forward pass."""

    cache: Path = Path("~/.cache/manylora/bench/image")
    """Where latents and verdicts of finished rows are kept: a killed measurement goes on with the row it was at."""

    out: Path | None = None
    """Folder for the table (markdown) and the plot (PNG). None: beside the record, or none."""

    record: bool | None = None
    """Keep the result in benchmarks/records. None: if the working tree is clean."""

    json: bool = False
    """Print the record alone, one JSON object."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_prompts < 4:
            raise ConfigError(
                f"num_prompts must be at least 4, or no interval says anything; got {self.num_prompts}"
            )
        tables = ("sweep", "steps", "close", "full", "universal", "ranks", "weights")
        if self.table not in tables:
            raise ConfigError(f"table must be one of {', '.join(tables)}, got {self.table!r}")
        if not all(rank >= 1 for rank in self.ranks):
            raise ConfigError(f"ranks must be at least 1, got {self.ranks}")
        if self.chance not in ("prompts", "seeds"):
            raise ConfigError(f"chance must be prompts or seeds, got {self.chance!r}")
        if self.chance == "seeds" and self.num_seeds < 3:
            raise ConfigError(f"chance seeds wants num_seeds of 3 or more, got {self.num_seeds}")
        if not all(1 <= guidance <= 1000 for guidance in (self.guidance, *self.guidances)):
            raise ConfigError(f"guidance must lie in [1, 1000], got {self.guidance} and {self.guidances}")
        if self.table != "sweep" and self.loras is None:
            raise ConfigError(f"table {self.table} draws with LoRAs: say where they lie with loras")
        if self.table in ("universal", "weights") and self.style_judge is None:
            raise ConfigError(f"table {self.table} asks which style a picture has: give style_judge")
        if self.table not in ("universal", "weights") and self.styles:
            raise ConfigError("styles belong to the tables universal and weights")
        if self.table == "weights" and not self.styles:
            raise ConfigError("table weights maps styles: name one at least with styles")
        if self.table != "universal" and self.finetuned:
            raise ConfigError("finetuned belongs to the table universal")
        if self.table not in ("steps", "close", "universal", "ranks") and self.phased:
            raise ConfigError("phased belongs to the tables steps, close, universal and ranks")
        if self.table == "close" and not self.phased:
            raise ConfigError(
                "table close looks at LoRAs distilled by phases: name one at least with phased"
            )
        for text in self.phased:
            if len(Mixture.parse(text).names) != 1:
                raise ConfigError(f"phased takes LoRAs one by one, NAME or NAME:WEIGHT; got {text!r}")
            if self.table == "ranks" and ":" in text:
                raise ConfigError(
                    f"the table ranks looks at LoRAs as they are, without weights; got {text!r}"
                )
        if self.table != "ranks" and self.retrained:
            raise ConfigError("retrained belongs to the table ranks")
        if (self.table == "full") != bool(self.full):
            raise ConfigError(
                "the table full, and no other, wants full: the base with all weights distilled"
            )
