"""Draw docs/lcm_styles.png, each shipped style alone at 32 steps and beside the LCM-LoRA at 4: lcm_picture.py."""

from pathlib import Path

from rich.console import Console

from manylora.cli.demo_pictures import SHIPPED, draw_grid, fast, slow

PROMPTS = ("a cat", "a rocket", "a house", "an apple", "a guitar", "a panda")
OUT = Path(__file__).parents[1] / "docs" / "lcm_styles.png"

if __name__ == "__main__":
    styles = sorted(path.name for path in (SHIPPED / "loras").iterdir() if path.name != "lcm")
    columns = [slow("base, 32", None, 32), fast("lcm, 4", "lcm", 4)]
    for style in styles:
        columns += [slow(f"{style}, 32", f"{style}:0.8", 32), fast("+ lcm, 4", f"{style}:0.8+lcm", 4)]
    title = "each style at 0.8: alone at 32 guided steps, and with the LCM-LoRA at 4 unguided ones"
    draw_grid(Console(), OUT, PROMPTS, columns, title)
