"""The style sheet and the script of the page: both are part of it, and it loads nothing else."""

from __future__ import annotations

import base64
import hashlib

_COLORS = "".join(
    f"polyline.run{n} {{ stroke: var(--run{n}) }} circle.run{n} {{ fill: var(--run{n}) }} "
    f".key.run{n} {{ background: var(--run{n}) }}\n"
    for n in range(4)
)
STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d2329; --soft: #66707a; --paper: #fdfdfb; --line: #dfe3e6;
  --run0: #1f6feb; --run1: #d4651a; --run2: #2f8f4e; --run3: #8b4bc1; --hint: #fff3d6; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8eb; --soft: #98a2ab; --paper: #15191d; --line: #30373d;
  --run0: #6ea8ff; --run1: #f0a35e; --run2: #6fcf8f; --run3: #c49bf0; --hint: #3b3115; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; margin-bottom: .3rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
p.headline {{ font-size: 1.1rem; font-weight: 600 }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 1rem }}
figure {{ margin: 0; min-width: 0 }} figcaption {{ font-weight: 600 }} svg {{ display: block; width: 100% }}
small, .tick {{ color: var(--soft); fill: var(--soft); font-weight: 400 }}
.tick {{ font-size: 12px }} .grid {{ stroke: var(--line) }} .mark {{ stroke: var(--soft); stroke-dasharray: 4 3 }}
.cursor {{ stroke: var(--soft); visibility: hidden }} svg {{ touch-action: pan-y }}
output {{ display: block; min-height: 1.5em; font-size: 13px; font-variant-numeric: tabular-nums }}
label {{ margin-right: 1rem; white-space: nowrap }}
svg.log, svg.tokens, polyline.smooth {{ display: none }}
#log:checked ~ .curves svg.linear, #tokens:checked ~ .curves svg.steps {{ display: none }}
#log:checked ~ #tokens:not(:checked) ~ .curves svg.steps.log,
#log:not(:checked) ~ #tokens:checked ~ .curves svg.tokens.linear,
#log:checked ~ #tokens:checked ~ .curves svg.tokens.log {{ display: block }}
#smooth:checked ~ .curves polyline.smooth {{ display: inline }}
#smooth:checked ~ .curves polyline.raw {{ opacity: .25 }}
polyline {{ fill: none; stroke-width: 1.6 }} polyline.run1 {{ stroke-dasharray: 7 3 }}
polyline.run2 {{ stroke-dasharray: 2 3 }} polyline.run3 {{ stroke-dasharray: 9 3 2 3 }}
table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: .15rem .6rem .15rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top }} td:first-child {{ min-width: 6.5em }}
tr.differs td {{ background: var(--hint) }} pre {{ white-space: pre-wrap; border-left: 3px solid var(--line);
  padding-left: 1rem }} .key {{ display: inline-block; width: 1.4em; height: .3em; vertical-align: middle }}
{_COLORS}"""

SCRIPT = """
"use strict";
// Show the values of all runs below a chart, at the step that is nearest to the pointer.
const short = value => String(Number(value.toPrecision(6)));
for (const figure of document.querySelectorAll("figure")) {
  const { runs, points, over } = JSON.parse(figure.dataset.chart);
  const output = figure.querySelector("output");
  for (const svg of figure.querySelectorAll("svg")) {
    const [low, high, first, last] = svg.dataset.x.split(",").map(Number);
    const inner = svg.dataset.log === "1" ? Math.log : value => value;
    const outer = svg.dataset.log === "1" ? Math.exp : value => value;
    const factors = svg.dataset.factors.split(",").map(Number);
    const cursor = svg.querySelector(".cursor");
    const show = event => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const at = (event.clientX - box.left) / box.width * view.width;
      const value = outer(inner(low) + (at - first) / (last - first) * (inner(high) - inner(low)));
      output.replaceChildren();
      let nearest = null;
      runs.forEach((name, number) => {
        const distance = point => Math.abs(inner(point[0] * factors[number]) - inner(value));
        const point = points[number].reduce((a, b) => distance(b) < distance(a) ? b : a, points[number][0]);
        if (!point) return;
        if (nearest === null || distance(point) < Math.abs(inner(nearest) - inner(value)))
          nearest = point[0] * factors[number];
        const key = document.createElement("span");
        key.className = `key run${number}`;
        output.append(key, ` ${short(point[1])} ${over.replace("%", point[0])}  `);
      });
      const share = (inner(nearest) - inner(low)) / ((inner(high) - inner(low)) || 1);
      const x = nearest === null ? first : first + share * (last - first);
      for (const [name, place] of [["x1", x], ["x2", x], ["y1", 0], ["y2", view.height - 28]])
        cursor.setAttribute(name, place);
      cursor.style.visibility = "visible";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; output.replaceChildren(); });
  }
}
"""

POLICY = (
    f"default-src 'none'; script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'; "
    "style-src 'unsafe-inline'; img-src data:"
)
"""What a browser may load and run: nothing from elsewhere, and no script but this one."""
