"""Draws the learning curves of training runs: held-out bits per byte against steps.

python examples/plot_curves.py examples/skipless-*/training_log.json examples/skipless-ordinary.json -o curves.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure


def label(log: dict[str, Any]) -> str:
    """What a run trained and where it ended."""
    config = log["config"]
    norm = {"none": "no norm", "rms": "RMSNorm"}[config["norm"]]
    heads = "MHA" if config["heads"] == config["kv_heads"] else "GQA"
    skips = "no skips" if config["skipless"] else "skips"
    return f"{skips}, {norm}, {heads}: {log['figures']['held_out_bits_per_byte']:.3f}"


def draw(logs: list[dict[str, Any]], out: Path) -> None:
    """One curve a run, in the order of the legend from the highest end to the lowest; dashed with skips."""
    # the text stays text, and the file is the same each time
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot(xlabel="steps", ylabel="held-out bits per byte")
        for log in sorted(logs, key=lambda log: -float(log["figures"]["held_out_bits_per_byte"])):
            steps, bits = ([point[key] for point in log["curve"]] for key in ("step", "held_out_bits_per_byte"))
            axes.plot(steps, bits, "-" if log["config"]["skipless"] else "k--", label=label(log))
        axes.legend(title="model: at the end", frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    """Reads the logs and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="training_log.json of each run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture (.svg, .png)")
    args = parser.parse_args()
    draw([json.loads(path.read_text(encoding="utf-8")) for path in args.logs], args.out)


if __name__ == "__main__":
    main()
