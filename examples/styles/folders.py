"""Where the recipe keeps things, beside what `icons` keeps."""

from icons.folders import DATA_FOLDER, RUNS_FOLDER

STYLES_FOLDER = DATA_FOLDER.parent / "styles"
"""Pictures of each style; made again in two or three minutes."""

PIPELINE_FOLDER = RUNS_FOLDER / "pipeline"
"""The base, written by `python -m icons.export`."""

LORAS_FOLDER = RUNS_FOLDER / "loras"

FINETUNED_FOLDER = RUNS_FOLDER / "pipeline-finetuned"
"""The base fine-tuned on another set, written by `python -m styles.merge`."""
